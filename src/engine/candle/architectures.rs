//! The architectures of candle that are offered, and how each is read.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{
    gemma, gemma2, gemma3, olmo2, phi3, quantized_phi3, qwen2_moe, qwen3_moe, stable_lm, starcoder2,
};
use serde_json::Value;

use super::Outcome;

/// A model with the keys and values of one sequence.
pub(super) trait Sequence: Send {
    /// The logits after the last of `tokens`, `(1, T)`, of which the first has this position.
    fn forward(&mut self, tokens: &Tensor, position: usize) -> Outcome<Tensor>;
}

macro_rules! sequences {
    ($($model:ty),*) => {$(
        impl Sequence for $model {
            fn forward(&mut self, tokens: &Tensor, position: usize) -> Outcome<Tensor> {
                <$model>::forward(self, tokens, position)
            }
        }
    )*};
}

sequences!(
    gemma::Model,
    gemma2::Model,
    gemma3::Model,
    olmo2::Model,
    phi3::Model,
    qwen2_moe::Model,
    qwen3_moe::ModelForCausalLM,
    stable_lm::Model,
    starcoder2::Model,
    quantized_phi3::ModelWeights
);

/// Makes a model that has run nothing yet.
pub(super) type NewSequence = Box<dyn Fn() -> Outcome<Box<dyn Sequence>> + Send + Sync>;

/// Reads a `config.json` and the weights beside it.
pub(super) type FromDirectory = fn(&Value, VarBuilder<'static>) -> Outcome<NewSequence>;

/// Reads a GGUF file.
pub(super) type FromFile = fn(&Path, &Device) -> Outcome<NewSequence>;

/// An architecture in model directories.
pub(super) struct Architecture {
    pub(super) model_type: &'static str,
    pub(super) read: FromDirectory,
    /// Whether a prompt must go in token by token, because candle's cache takes no values of several positions as this model gives them.
    pub(super) token_by_token: bool,
    /// Entries that candle does not read although they change numbers, and what it takes for granted: that they are true, or else that
    /// they are null, false or empty.
    pub(super) granted: &'static [(&'static str, bool)],
}

const PLAIN: Architecture =
    Architecture { model_type: "", read: |_, _| candle_core::bail!("no model"), token_by_token: false, granted: &[] };

pub(super) const DIRECTORIES: [Architecture; 9] = [
    Architecture { model_type: "gemma", read: |c, w| each(c, w, |c, w| gemma::Model::new(false, c, w)), ..PLAIN },
    Architecture { model_type: "gemma2", read: |c, w| each(c, w, |c, w| gemma2::Model::new(false, c, w)), ..PLAIN },
    Architecture {
        model_type: "gemma3_text",
        read: |c, w| each(c, w, |c, w| gemma3::Model::new(false, c, w)),
        token_by_token: true,
        ..PLAIN
    },
    Architecture { model_type: "olmo2", read: |c, w| each(c, w, olmo2::Model::new), ..PLAIN },
    Architecture { model_type: "phi3", read: |c, w| each(c, w, phi3::Model::new), ..PLAIN },
    Architecture {
        model_type: "qwen2_moe",
        read: |c, w| each(c, w, qwen2_moe::Model::new),
        granted: &[("qkv_bias", true), ("mlp_only_layers", false)],
        ..PLAIN
    },
    Architecture {
        model_type: "qwen3_moe",
        read: |c, w| each(c, w, qwen3_moe::ModelForCausalLM::new),
        token_by_token: true,
        granted: &[("mlp_only_layers", false)],
    },
    Architecture {
        model_type: "stablelm",
        read: |c, w| each(c, w, stable_lm::Model::new),
        granted: &[("qk_layernorm", false), ("use_parallel_residual", false)],
        ..PLAIN
    },
    Architecture { model_type: "starcoder2", read: |c, w| each(c, w, starcoder2::Model::new), ..PLAIN },
];

/// Architectures in GGUF files, by `general.architecture`. candle's Gemma 3 does not compute what transformers does from such a file.
pub(super) const FILES: [(&str, FromFile); 1] = [("phi3", |path, device| {
    of_file(path, |header, file| quantized_phi3::ModelWeights::from_gguf(false, header, file, device))
})];

fn each<C, M>(
    config: &Value,
    weights: VarBuilder<'static>,
    new: impl Fn(&C, VarBuilder<'static>) -> Outcome<M> + Send + Sync + 'static,
) -> Outcome<NewSequence>
where
    C: serde::de::DeserializeOwned + Send + Sync + 'static,
    M: Sequence + 'static,
{
    let config: C = serde_json::from_value(config.clone()).map_err(candle_core::Error::wrap)?;
    Ok(Box::new(move || Ok(Box::new(new(&config, weights.clone())?))))
}

fn of_file<M: Sequence + Clone + Sync + 'static>(
    path: &Path,
    read: impl FnOnce(Content, &mut BufReader<File>) -> Outcome<M>,
) -> Outcome<NewSequence> {
    let mut file = BufReader::new(File::open(path)?);
    let header = Content::read(&mut file)?;
    let model = read(header, &mut file)?;
    Ok(Box::new(move || Ok(Box::new(model.clone())))) // before it has run anything
}
