//! Options of an adapter that is trained in the place of the weights.

use crate::error::{Error, Result};
use crate::model::{AdapterConfig, Model, Parameter, TARGETS, target_name};

/// Configures an adapter.
#[derive(Debug, Clone, clap::Args)]
pub struct AdapterArgs {
    /// Train a low-rank adapter (LoRA) of this rank, and not the weights. A policy that is an adapter is trained on without this option
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub lora_rank: Option<u32>,
    /// What the adapter adds to a matrix is multiplied by ALPHA / R [default: 2 R]
    #[arg(long, value_name = "ALPHA", requires = "lora_rank")]
    pub lora_alpha: Option<f64>,
    /// The matrices of each layer that get an adapter [default: all of q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]
    #[arg(long, value_name = "NAMES", requires = "lora_rank", value_delimiter = ',', value_parser = target)]
    pub lora_targets: Vec<Parameter>,
    /// 0, which PEFT has as its default: with dropout a policy would not train on the probabilities that it sampled with
    #[arg(long, value_name = "0", requires = "lora_rank", value_parser = no_dropout)]
    pub lora_dropout: Option<f64>,
}

fn target(name: &str) -> std::result::Result<Parameter, String> {
    let names = TARGETS.map(target_name).join(", ");
    TARGETS.into_iter().find(|one| target_name(*one) == name).ok_or_else(|| format!("the names are {names}"))
}

fn no_dropout(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(0.0) => Ok(0.0),
        _ => Err("only 0: with dropout a policy would not train on the probabilities that it sampled with".into()),
    }
}

impl AdapterArgs {
    /// The model as it is trained: with a new adapter, or one that goes on.
    ///
    /// # Errors
    /// [`Error::Usage`] when the model is an adapter with other numbers, or a number is out of range.
    pub fn apply(&self, model: Model, seed: u64) -> Result<Model> {
        let Some(rank) = self.lora_rank else { return Ok(model) };
        let alpha = self.lora_alpha.unwrap_or(2.0 * f64::from(rank));
        if !(alpha.is_finite() && alpha > 0.0) {
            return Err(Error::Usage("--lora-alpha must be more than 0".into()));
        }
        let is_target = |one: &Parameter| self.lora_targets.is_empty() || self.lora_targets.contains(one);
        let targets = TARGETS.into_iter().filter(is_target).collect();
        // No option: an adapter of PEFT's that is so stays so.
        let is_rank_stabilized = model.adapter().is_some_and(|there| there.is_rank_stabilized);
        let wanted = AdapterConfig { rank: rank as usize, alpha, is_rank_stabilized, targets };
        match model.adapter() {
            None => Ok(model.with_adapter(wanted, seed)),
            Some(there) if *there == wanted => Ok(model),
            Some(there) => Err(Error::Usage(format!(
                "the policy is an adapter of other numbers: --lora-rank {} --lora-alpha {} --lora-targets {}",
                there.rank,
                there.alpha,
                there.targets.iter().map(|one| target_name(*one)).collect::<Vec<_>>().join(",")
            ))),
        }
    }
}
