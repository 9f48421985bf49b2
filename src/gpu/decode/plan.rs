//! Plans the GPU memory of sampling before any of it is allocated.

use std::fmt;

use super::slots::{SlotCapacity, Slots};
use super::step::DecodeStep;
use crate::error::{Error, Result};
use crate::gpu::ParameterLayout;
use crate::model::Config;
use crate::numbers::dtype::Dtype;

/// GPU memory of each part of sampling (bytes).
#[derive(Debug, Clone, Copy)]
pub struct SamplingPlan {
    /// Parameters and rotary tables.
    pub weights: usize,
    /// Keys and values of prompts and completions.
    pub caches: usize,
    /// Buffers of a decode step, and the logits of prompts.
    pub step: usize,
    /// Buffers of the prompts that are prefilled together.
    pub prefill: usize,
}

impl SamplingPlan {
    /// Plans for sequences of `shape`, with up to `prefill_rows` tokens of prompts in one prefill.
    ///
    /// # Errors
    /// [`Error::Device`] when the kernels do not support the model's shape.
    pub fn new(config: &Config, shape: SlotCapacity, dtype: Dtype, prefill_rows: usize) -> Result<Self> {
        let layout = ParameterLayout::new(config, config.stored())?;
        let positions = shape.max_prompt_tokens + shape.max_completion_tokens;
        let (d, f, attended) = (config.hidden_size, config.intermediate_size, config.attention_width());
        let qkv = attended + 2 * config.kv_width();
        let in_f32 = d + d.max(qkv) + config.num_attention_heads; // residual stream, products, log-sum-exps
        let in_dtype = d + attended + qkv + 3 * f;
        Ok(Self {
            weights: layout.matrices * dtype.size()
                + 4 * (layout.all - layout.matrices + positions * config.head_dim()),
            caches: Slots::cache_bytes(config, shape, dtype),
            step: DecodeStep::buffer_bytes(config, dtype, shape.slots) + 4 * shape.slots * config.vocab_size,
            prefill: prefill_rows.max(shape.max_prompt_tokens) * (4 * in_f32 + dtype.size() * in_dtype),
        })
    }

    /// The sum of all parts (bytes).
    #[must_use]
    pub fn total(&self) -> usize {
        self.weights + self.caches + self.step + self.prefill
    }

    /// Refuses a plan that does not fit into `room` bytes.
    ///
    /// # Errors
    /// [`Error::Device`] with the sizes, and which options to lower.
    pub fn check(&self, room: usize) -> Result<()> {
        if self.total() <= room {
            return Ok(());
        }
        Err(Error::Device(format!(
            "{self} do not fit into {}: lower --max-sequences, --max-prompt-tokens or --max-completion-tokens, or raise \
             --gpu-memory-fraction",
            gib(room)
        )))
    }
}

impl fmt::Display for SamplingPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [weights, caches, step, prefill, total] =
            [self.weights, self.caches, self.step, self.prefill, self.total()].map(gib);
        write!(
            f,
            "{total} of GPU memory (weights {weights}, keys and values {caches}, a step {step}, prompts {prefill})"
        )
    }
}

fn gib(bytes: usize) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Family, RopeParameters, Scaling};

    #[test]
    fn the_plan_of_the_reference_shape_is_what_its_numbers_say() {
        let config = Config {
            vocab_size: 151_936,
            hidden_size: 896,
            intermediate_size: 4864,
            num_hidden_layers: 24,
            num_attention_heads: 14,
            num_key_value_heads: 2,
            head_dim: None,
            family: Family::Qwen2,
            qkv_bias: true,
            qk_norm: false,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            rope: RopeParameters { rope_theta: 1e6, scaling: Scaling::Default },
            tie_word_embeddings: true,
            initializer_range: 0.02,
            pad_token_id: None,
        };
        let shape = SlotCapacity { slots: 64, max_prompt_tokens: 256, max_completion_tokens: 200 };
        let plan = SamplingPlan::new(&config, shape, Dtype::Bf16, 8192).unwrap();
        assert_eq!(plan.caches, 64 * 456 * 12_288, "12 KiB a token, as performance tables say");
        assert!((988_000_000..989_000_000).contains(&plan.weights), "{}", plan.weights);
        assert!(plan.check(plan.total()).is_ok());
        let refused = plan.check(1 << 30).unwrap_err();
        assert_eq!(refused.exit_code(), 1);
        assert!(refused.to_string().contains("do not fit into 1.00 GiB: lower --max-sequences"), "{refused}");
    }
}
