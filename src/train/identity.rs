//! The policy id of the weights that a step makes: a hash of the parent's id, the records, and the numbers listed here.
//!
//! Every number on which the weights depend is listed by a name of its own, in a fixed order, so that renaming a field in Rust
//! cannot change the id of a checkpoint.

use serde_json::{Value, json};

use crate::checkpoint::derive_id;
use crate::grpo::advantage::{AdvantageConfig, PartWeights, ScaleRewards};
use crate::grpo::loss::{ImportanceMode, KlEstimator, LossConfig, LossKind, RatioLevel};
use crate::model::{AdapterConfig, target_name};
use crate::optim::{OptimizerConfig, Schedule};
use crate::train::config::{GrpoConfig, SupervisedConfig};

/// The format of the hashed bytes. Increment it with any change to the lists below: the same step then has another id. Formats above
/// 1 are hashed too; 1 is the format of the time before there was a number.
const FORMAT: u8 = 1;

/// The numbers of a step, besides those of the optimizer.
#[derive(Debug, Clone, Copy)]
pub enum StepNumbers<'a> {
    /// A GRPO step.
    Grpo {
        /// Its configuration.
        config: &'a GrpoConfig,
        /// The policy id of the reference model.
        reference: Option<&'a str>,
        /// The policy id of the teacher.
        teacher: Option<&'a str>,
        /// Tokens per micro-batch: sums are taken in its order.
        micro_batch_tokens: usize,
    },
    /// A supervised step.
    Supervised(SupervisedConfig),
}

/// The numbers of a step that enter the policy id, in the order of the hash.
#[derive(Debug, Clone, Copy)]
pub struct StepIdentity<'a> {
    /// Policy id of the weights that the step started from.
    pub parent: &'a str,
    /// Digest of the records it was trained on.
    pub records: &'a [u8],
    /// Its own numbers.
    pub numbers: StepNumbers<'a>,
    /// The optimizer's.
    pub optimizer: &'a OptimizerConfig,
    /// The dtype of a GPU's matrix products; `None` on the CPU.
    pub compute_dtype: Option<&'a str>,
    /// The adapter that is trained in the place of the weights, and the seed that it began from.
    pub adapter: Option<(&'a AdapterConfig, u64)>,
    /// Processes that trained together: gradients are summed over each one's groups, and then over them.
    pub ranks: usize,
}

impl StepIdentity<'_> {
    /// The id of the weights that the step makes.
    #[must_use]
    pub fn policy_id(&self) -> String {
        let step = match self.numbers {
            StepNumbers::Grpo { config, reference, teacher: None, micro_batch_tokens } => {
                json!([grpo(config), reference, micro_batch_tokens])
            }
            StepNumbers::Grpo { config, reference, teacher, micro_batch_tokens } => {
                json!([grpo(config), reference, micro_batch_tokens, teacher, config.loss.distill])
            }
            StepNumbers::Supervised(config) => supervised(config),
        };
        let numbers = json!([step, optimizer(self.optimizer)]).to_string() + self.compute_dtype.unwrap_or_default();
        let mut parts = vec![self.parent.as_bytes(), self.records, numbers.as_bytes()];
        let adapter = self.adapter.map(|(config, seed)| json!([adapter(config), seed]).to_string());
        parts.extend(adapter.as_ref().map(|adapter| adapter.as_bytes()));
        let ranks = (self.ranks > 1).then(|| format!("{} ranks", self.ranks));
        parts.extend(ranks.as_ref().map(|ranks| ranks.as_bytes()));
        if FORMAT > 1 {
            parts.push(&[FORMAT]);
        }
        derive_id(&parts)
    }
}

/// `reference` and `teacher` enter by their policy ids, and `dynamic_sampling` by the records that it chooses; `max_staleness` and `logprob_band` refuse
/// steps and do not change any.
fn grpo(config: &GrpoConfig) -> Value {
    let GrpoConfig {
        loss,
        advantage,
        num_iterations,
        reference: _,
        teacher: _,
        reference_sync_steps,
        reference_mixup_alpha,
        max_staleness: _,
        dynamic_sampling: _,
        logprob_band: _,
    } = config;
    let AdvantageConfig { scale_rewards, leave_one_out, normalize_then_sum } = advantage;
    let scale_rewards = match scale_rewards {
        ScaleRewards::Group => "group",
        ScaleRewards::Batch => "batch",
        ScaleRewards::None => "none",
    };
    let mut numbers =
        json!({"loss": loss_numbers(loss), "scale_rewards": scale_rewards, "num_iterations": num_iterations});
    // Absent in the ids of steps without them.
    if let Some(steps) = reference_sync_steps {
        numbers["reference_sync"] = json!([steps, reference_mixup_alpha]);
    }
    if *leave_one_out {
        numbers["leave_one_out"] = json!(true);
    }
    if let Some(PartWeights(weights)) = normalize_then_sum {
        numbers["normalize_then_sum"] = json!(weights);
    }
    numbers
}

fn loss_numbers(config: &LossConfig) -> Value {
    let LossConfig {
        kind,
        epsilon,
        epsilon_high,
        beta,
        distill: _, // with the teacher
        mask_truncated,
        max_completion_tokens,
        importance_sampling_clip_max,
        importance_sampling_clip_min,
        importance_sampling_mode,
        delta,
        ratio_level,
        sapo_temperature_pos,
        sapo_temperature_neg,
        kl_estimator,
        top_entropy_quantile,
        off_policy_mask_threshold,
        entropy_coef,
    } = config;
    let kind = kind_name(*kind);
    let temperatures = (kind == "sapo").then_some([sapo_temperature_pos, sapo_temperature_neg]);
    let top_entropy = Some(top_entropy_quantile).filter(|fraction| **fraction < 1.0);
    let mut numbers = json!({
        "kind": kind,
        "epsilon": epsilon,
        "epsilon_high": epsilon_high,
        "beta": beta,
        "mask_truncated": mask_truncated,
        "max_completion_tokens": max_completion_tokens,
    });
    // Absent in the ids of steps without them.
    let more = [
        ("importance_sampling_clip_max", json!(importance_sampling_clip_max)),
        ("importance_sampling_clip_min", json!(importance_sampling_clip_min)),
        ("importance_sampling_mode", json!(mode_name(*importance_sampling_mode))),
        ("delta", json!(delta)),
        ("ratio_level", json!(ratio_level.map(level_name))),
        ("sapo_temperatures", json!(temperatures)),
        ("kl_estimator", json!(estimator_name(*kl_estimator))),
        ("top_entropy_quantile", json!(top_entropy)),
        ("off_policy_mask_threshold", json!(off_policy_mask_threshold)),
        ("entropy_coef", json!(Some(entropy_coef).filter(|weight| **weight != 0.0))),
    ];
    for (name, value) in more.into_iter().filter(|(_, value)| !value.is_null()) {
        numbers[name] = value;
    }
    numbers
}

fn adapter(config: &AdapterConfig) -> Value {
    let AdapterConfig { rank, alpha, is_rank_stabilized, targets } = config;
    json!([rank, alpha, is_rank_stabilized, targets.iter().map(|one| target_name(*one)).collect::<Vec<_>>()])
}

fn kind_name(kind: LossKind) -> &'static str {
    match kind {
        LossKind::Grpo => "grpo",
        LossKind::Bnpo => "bnpo",
        LossKind::DrGrpo => "dr_grpo",
        LossKind::Dapo => "dapo",
        LossKind::Cispo => "cispo",
        LossKind::Sapo => "sapo",
        LossKind::Gspo => "gspo",
        LossKind::Luspo => "luspo",
    }
}

fn level_name(level: RatioLevel) -> &'static str {
    match level {
        RatioLevel::Token => "token",
        RatioLevel::Sequence => "sequence",
        RatioLevel::SequenceToken => "sequence_token",
    }
}

/// `None` for the mode of the time when there was one.
fn mode_name(mode: ImportanceMode) -> Option<&'static str> {
    match mode {
        ImportanceMode::TokenTruncate => None,
        ImportanceMode::TokenMask => Some("token_mask"),
        ImportanceMode::SequenceTruncate => Some("sequence_truncate"),
        ImportanceMode::SequenceMask => Some("sequence_mask"),
    }
}

/// `None` for the estimate of the time when there was one.
fn estimator_name(estimator: KlEstimator) -> Option<&'static str> {
    match estimator {
        KlEstimator::K1 => Some("k1"),
        KlEstimator::K2 => Some("k2"),
        KlEstimator::K3 => Some("k3"),
        KlEstimator::K3Weighted => None,
    }
}

fn supervised(config: SupervisedConfig) -> Value {
    let SupervisedConfig { loss_on_prompt, micro_batch_tokens } = config;
    json!({"loss_on_prompt": loss_on_prompt, "micro_batch_tokens": micro_batch_tokens})
}

fn optimizer(config: &OptimizerConfig) -> Value {
    let OptimizerConfig {
        learning_rate,
        adam_beta1,
        adam_beta2,
        adam_epsilon,
        weight_decay,
        max_grad_norm,
        optimizer_state,
        schedule,
        warmup_ratio,
        total_steps,
    } = config;
    let optimizer_state = optimizer_state.name();
    let schedule = match schedule {
        Schedule::Constant => "constant",
        Schedule::Linear => "linear",
        Schedule::Cosine => "cosine",
    };
    json!({
        "learning_rate": learning_rate,
        "adam_beta1": adam_beta1,
        "adam_beta2": adam_beta2,
        "adam_epsilon": adam_epsilon,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "optimizer_state": optimizer_state,
        "schedule": schedule,
        "warmup_ratio": warmup_ratio,
        "total_steps": total_steps,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpo::completion::Staleness;
    use crate::numbers::dtype::Dtype;

    /// The policy id that a supervised step of version 0.1.0 gave, and the parent of the steps below.
    const PARENT: &str = "c51795bd72d2a7bd497d66fdb0dcb4bd";

    fn hash(line: &str) -> [u8; 32] {
        blake3::hash(line.as_bytes()).into()
    }

    fn advantage(scale_rewards: ScaleRewards) -> AdvantageConfig {
        AdvantageConfig { scale_rewards, leave_one_out: false, normalize_then_sum: None }
    }

    fn grpo_config(loss: LossConfig) -> GrpoConfig {
        GrpoConfig {
            loss,
            advantage: advantage(ScaleRewards::Group),
            num_iterations: 1,
            reference: None,
            teacher: None,
            reference_sync_steps: None,
            reference_mixup_alpha: 0.6,
            max_staleness: Staleness::Any,
            dynamic_sampling: None,
            logprob_band: 0.05,
        }
    }

    fn dapo() -> LossConfig {
        LossConfig {
            kind: LossKind::Dapo,
            epsilon: 0.2,
            epsilon_high: Some(0.28),
            beta: 0.0,
            distill: 0.0,
            mask_truncated: false,
            max_completion_tokens: None,
            importance_sampling_clip_max: None,
            importance_sampling_clip_min: None,
            importance_sampling_mode: ImportanceMode::TokenTruncate,
            delta: None,
            ratio_level: None,
            sapo_temperature_pos: 1.0,
            sapo_temperature_neg: 1.05,
            kl_estimator: KlEstimator::K3Weighted,
            top_entropy_quantile: 1.0,
            off_policy_mask_threshold: None,
            entropy_coef: 0.0,
        }
    }

    /// The digest of two rollouts, as [`crate::grpo::groups::digest`] makes it.
    fn rollouts() -> blake3::Hash {
        let record = |sample: u64, tokens: &str, logprobs: &str, reward: u64| {
            hash(&format!(
                "{{\"group_id\":\"a\",\"group_size\":2,\"sample_index\":{sample},\"prompt_token_ids\":[1,2],\
                 \"completion_token_ids\":{tokens},\"logprobs\":{logprobs},\"reward\":{reward}}}"
            ))
        };
        blake3::hash(&[record(0, "[3,4]", "[-4,-4]", 1), record(1, "[5]", "[-4]", 0)].concat())
    }

    fn step(numbers: StepNumbers<'_>, records: &[u8], optimizer: &OptimizerConfig, dtype: Option<&str>) -> String {
        let (compute_dtype, adapter) = (dtype, None);
        StepIdentity { parent: PARENT, records, numbers, optimizer, compute_dtype, adapter, ranks: 1 }.policy_id()
    }

    /// The ids of version 0.1.0, which hashed serde's field names:
    /// `grpo-step --init --seed 7 --supervised --loss-on-prompt --policy pipelines/recipes/tiny --out a --learning-rate 3e-3
    /// --schedule linear --warmup-ratio 0.02 --total-steps 50 --micro-batch-tokens 512`.
    #[test]
    fn the_id_of_a_supervised_step_stays() {
        let records = hash(r#"{"prompt":"What is 1 + 1?","completion":"2"}"#);
        let optimizer = OptimizerConfig {
            learning_rate: 3e-3,
            schedule: Schedule::Linear,
            warmup_ratio: 0.02,
            total_steps: Some(50),
            ..OptimizerConfig::default()
        };
        let numbers = StepNumbers::Supervised(SupervisedConfig { loss_on_prompt: true, micro_batch_tokens: 512 });
        let parent = "47b6c770709e39d86759cdc5b6c9aacb";
        let (compute_dtype, adapter, ranks) = (None, None, 1);
        let identity =
            StepIdentity { parent, records: &records, numbers, optimizer: &optimizer, compute_dtype, adapter, ranks };
        assert_eq!(identity.policy_id(), PARENT);
        assert_ne!(StepIdentity { ranks: 2, ..identity }.policy_id(), PARENT, "its sums are of other bits");
    }

    /// `grpo-step --policy a --out b --max-staleness any --epsilon-high 0.28 --micro-batch-tokens 512`, then with `--loss dr_grpo
    /// --max-completion-tokens 16 --mask-truncated --beta 0.04 --reference a --scale-rewards none --num-iterations 2
    /// --importance-sampling-clip-max 2 --optimizer-state bf16 --adam-beta2 0.99 --weight-decay 0.1 --learning-rate 1e-5`.
    #[test]
    fn the_id_of_a_grpo_step_stays() {
        let defaults = OptimizerConfig::default();
        let config = grpo_config(dapo());
        let numbers = StepNumbers::Grpo { config: &config, reference: None, teacher: None, micro_batch_tokens: 512 };
        let id = step(numbers, rollouts().as_bytes(), &defaults, None);
        assert_eq!(id, "71f702106743dd1c2873e6957076e7d4");

        let loss = LossConfig {
            kind: LossKind::DrGrpo,
            epsilon_high: None,
            beta: 0.04,
            mask_truncated: true,
            max_completion_tokens: Some(16),
            importance_sampling_clip_max: Some(2.0),
            ..dapo()
        };
        let advantage = advantage(ScaleRewards::None);
        let config = GrpoConfig { advantage, num_iterations: 2, ..grpo_config(loss) };
        let numbers =
            StepNumbers::Grpo { config: &config, reference: Some(PARENT), teacher: None, micro_batch_tokens: 512 };
        let optimizer = OptimizerConfig {
            optimizer_state: Dtype::Bf16,
            adam_beta2: 0.99,
            weight_decay: 0.1,
            learning_rate: 1e-5,
            ..defaults
        };
        assert_eq!(step(numbers, rollouts().as_bytes(), &optimizer, None), "2bb7f89c732421615533137ab0c0c8e9");
        let on_gpu = step(numbers, rollouts().as_bytes(), &optimizer, Some("bf16"));
        assert_ne!(on_gpu, "2bb7f89c732421615533137ab0c0c8e9", "another arithmetic makes other weights");
    }
}
