//! Plans the GPU memory of training before any of it is allocated: which activations are kept, and how many tokens run at once.

use super::forward::KeptActivations;
use crate::error::{Error, Result};
use crate::gpu::ParameterLayout;
use crate::gpu::kernels::{self, ModelShape};
use crate::model::{AdapterConfig, Config};
use crate::numbers::dtype::Dtype;

/// Most logits held at once (bytes). Larger chunks are faster, because each chunk reads and writes the head's gradient once.
const LOGITS: usize = 1 << 30;
/// The same if the limit is above [`LARGE`].
const LOGITS_OF_LARGE: usize = 4 << 30;
const LARGE: usize = 40 << 30;

/// Entries per row of a batch: the positions of all sequences, where a prompt counts once per completion.
const ENTRIES_PER_ROW: usize = 4;

/// For the matrix library, and for fragmentation (bytes).
const ASIDE: usize = 256 << 20;

/// What is kept, and how many tokens run at once, the fastest first. Recomputing a block costs a quarter of a pass; fewer tokens cost
/// little.
const CHOICES: [(KeptActivations, usize); 11] = [
    (KeptActivations::All, 32768),
    (KeptActivations::All, 16384),
    (KeptActivations::All, 8192),
    (KeptActivations::All, 4096),
    (KeptActivations::All, 2048),
    (KeptActivations::NoMlp, 4096),
    (KeptActivations::NoMlp, 2048),
    (KeptActivations::Inputs, 4096),
    (KeptActivations::Inputs, 2048),
    (KeptActivations::Inputs, 1024),
    (KeptActivations::Inputs, 512),
];

/// More tokens than this need a limit above [`COMFORTABLE`], because they gain the least of all choices.
const MANY: usize = 16384;
const COMFORTABLE: usize = 48 << 30;

/// What training must hold in memory.
#[derive(Debug, Clone, Copy)]
pub struct PlanRequest<'a> {
    /// The shape of the policy.
    pub config: &'a Config,
    /// The adapter that is trained in the place of the weights.
    pub adapter: Option<&'a AdapterConfig>,
    /// The type that products read.
    pub dtype: Dtype,
    /// The type of the optimizer's moments.
    pub moments: Dtype,
    /// How many models of the same shape there are besides: a reference, a teacher.
    pub frozen: usize,
    /// Most tokens in the model at once, if the user has chosen.
    pub tokens: Option<usize>,
    /// The memory to stay within (bytes).
    pub limit: usize,
}

/// How training uses its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainingPlan {
    /// Which activations are kept.
    pub keep: KeptActivations,
    /// Most tokens in the model at once.
    pub tokens: usize,
    /// For logits (bytes).
    pub logits_bytes: usize,
    /// For weights, gradients and moments (bytes).
    fixed: usize,
    /// For activations and other buffers (bytes).
    moving: usize,
}

impl TrainingPlan {
    /// The fastest plan that fits.
    ///
    /// # Errors
    /// [`Error::Device`] with the sizes when none fits, or when the kernels do not support the shape.
    pub fn choose(request: PlanRequest<'_>) -> Result<Self> {
        let (shape, layout) =
            (ModelShape::new(request.config)?, ParameterLayout::new(request.config, request.config.stored())?);
        let copy = layout.matrices * request.dtype.size() + 4 * (layout.all - layout.matrices);
        let rope = 4 * request.config.positions() * shape.dim;
        // An adapter has a copy of its own, and the matrices of the base model in f32.
        let (trained, more) = request.adapter.map_or((layout.all, 0), |adapter| {
            let [own, adapted] = adapter.numbers(request.config);
            (own, own * request.dtype.size() + 4 * adapted)
        });
        let fixed =
            (1 + request.frozen) * (copy + rope) + (4 + 4 + 2 * request.moments.size()) * trained + more + ASIDE;
        let narrow = request.adapter.map_or(0, |adapter| adapter.rank * request.dtype.size());
        let row = 4 * kernels::stride(&shape);
        let choices = match request.tokens {
            Some(tokens) => [KeptActivations::All, KeptActivations::NoMlp, KeptActivations::Inputs]
                .map(|keep| (keep, tokens))
                .to_vec(),
            None => {
                let fit = |&(_, tokens): &(KeptActivations, usize)| tokens <= MANY || request.limit > COMFORTABLE;
                CHOICES.into_iter().filter(fit).collect()
            }
        };
        let logits = if request.limit > LARGE { LOGITS_OF_LARGE } else { LOGITS.min((request.limit / 16).max(row)) };
        let mut smallest = usize::MAX;
        for (keep, tokens) in choices {
            let logits_bytes = logits.min(row * tokens);
            let of_row = row_bytes(&shape, (request.dtype, keep), request.config.num_hidden_layers) + narrow;
            let moving = tokens * of_row + logits_bytes;
            let plan = Self { keep, tokens, logits_bytes, fixed, moving };
            if plan.bytes() <= request.limit {
                return Ok(plan);
            }
            smallest = smallest.min(plan.bytes());
        }
        let remedy = match request.moments {
            Dtype::F32 => format!("; --optimizer-state bf16 takes {} less", gib(4 * trained)),
            _ => String::new(),
        };
        Err(Error::Device(format!(
            "training needs {} of memory ({} of it for weights, gradients and moments); there are {}{remedy}",
            gib(smallest),
            gib(fixed),
            gib(request.limit)
        )))
    }

    /// The sum of all parts (bytes).
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.fixed + self.moving
    }

    /// Describes the plan in one line for the user.
    #[must_use]
    pub fn describe(&self) -> String {
        let kept = match self.keep {
            KeptActivations::All => "all activations kept",
            KeptActivations::NoMlp => "the MLP computed again",
            KeptActivations::Inputs | KeptActivations::Nothing => "each block computed again",
        };
        format!(
            "memory: {} for weights, gradients and moments, {} for {} tokens at once, {kept}",
            gib(self.fixed),
            gib(self.moving),
            self.tokens
        )
    }
}

/// Memory per row: `ForwardBuffers::new`, `BackwardPass::new`, and the head's memory per target (bytes).
fn row_bytes(shape: &ModelShape, (dtype, keep): (Dtype, KeptActivations), layers: usize) -> usize {
    let (b, d, f, heads) = (dtype.size(), shape.width, shape.mlp, shape.heads);
    let (attended, qkv) = (shape.attention_width(), shape.qkv());
    let (stream, gate_up) = (4 * d, 2 * b * f);
    let attention = b * (shape.normed_qk + qkv + attended) + 4 * heads + stream;
    let block = stream + attention + gate_up;
    let kept = match keep {
        KeptActivations::All => layers * block,
        KeptActivations::NoMlp => layers * (stream + attention) + gate_up,
        KeptActivations::Inputs => layers * stream + attention + gate_up,
        KeptActivations::Nothing => block,
    };
    let scratch = stream + 4 * d.max(qkv) + b * (d + f);
    let backward = stream + b * (d + attended + qkv) + 4 * heads + ENTRIES_PER_ROW * 8 * shape.kv_heads * shape.dim;
    let head = (4 + b) * d;
    kept + scratch + backward + head
}

/// `1.25 GiB`.
fn gib(bytes: usize) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Parameter;

    fn half_a_billion() -> Config {
        serde_json::from_value(serde_json::json!({
            "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": true
        }))
        .unwrap()
    }

    fn plan(limit: usize, tokens: Option<usize>) -> Result<TrainingPlan> {
        with_moments(Dtype::F32, limit, tokens)
    }

    fn with_moments(moments: Dtype, limit: usize, tokens: Option<usize>) -> Result<TrainingPlan> {
        let (config, limit) = (half_a_billion(), limit << 30);
        TrainingPlan::choose(PlanRequest {
            config: &config,
            adapter: None,
            dtype: Dtype::Bf16,
            moments,
            frozen: 1,
            tokens,
            limit,
        })
    }

    #[test]
    fn the_fastest_plan_that_fits_is_taken() {
        let found = |limit| plan(limit, None).map(|plan| (plan.keep, plan.tokens)).unwrap();
        assert_eq!(found(139), (KeptActivations::All, 32768));
        assert_eq!(found(49), (KeptActivations::All, 32768));
        assert_eq!(found(48), (KeptActivations::All, 16384));
        assert_eq!(found(14), (KeptActivations::All, 4096));
        assert_eq!(found(12), (KeptActivations::All, 2048));
        assert_eq!(found(11), (KeptActivations::NoMlp, 2048));
        assert_eq!(found(10), (KeptActivations::Inputs, 512));
        for limit in [10, 11, 12, 14, 41, 49, 139] {
            assert!(plan(limit, None).unwrap().bytes() <= limit << 30);
        }
    }

    #[test]
    fn logits_take_more_where_there_is_much_memory() {
        let found = |limit| plan(limit, None).unwrap().logits_bytes;
        assert_eq!([41, 40, 14].map(|limit| found(limit) >> 20), [4096, 1024, 896]);
    }

    #[test]
    fn moments_in_bf16_leave_two_bytes_a_number_of_each_kind() {
        let plans = [Dtype::F32, Dtype::Bf16].map(|moments| with_moments(moments, 139, None).unwrap());
        assert_eq!(plans[0].bytes() - plans[1].bytes(), 2 * 2 * 494_032_768);
        assert_eq!(
            with_moments(Dtype::Bf16, 8, None).map(|plan| (plan.keep, plan.tokens)).unwrap(),
            (KeptActivations::Inputs, 512)
        );
    }

    #[test]
    fn an_adapter_takes_its_own_moments_and_the_base_of_its_matrices() {
        let config = half_a_billion();
        let targets = vec![Parameter::QProj, Parameter::DownProj];
        let adapter = AdapterConfig { rank: 16, alpha: 32.0, is_rank_stabilized: false, targets };
        let plan = |adapter| {
            let request = PlanRequest {
                config: &config,
                adapter,
                dtype: Dtype::Bf16,
                moments: Dtype::F32,
                frozen: 0,
                tokens: Some(512),
                limit: 139 << 30,
            };
            TrainingPlan::choose(request).unwrap()
        };
        let (own, adapted) = (24 * 16 * (896 + 896 + 896 + 4864), 24 * (896 * 896 + 896 * 4864));
        let [whole, low_rank] = [plan(None), plan(Some(&adapter))];
        assert_eq!(whole.fixed - low_rank.fixed, 16 * 494_032_768 - (18 * own + 4 * adapted));
        assert_eq!(low_rank.moving - whole.moving, 512 * 16 * 2);
    }

    #[test]
    fn tokens_that_were_asked_for_stay_and_too_little_memory_is_named() {
        assert_eq!(plan(139, Some(1000)).unwrap().tokens, 1000);
        let refused = plan(8, None).unwrap_err();
        assert_eq!(refused.exit_code(), 1);
        let words = refused.to_string();
        assert!(words.starts_with("training needs "), "{words}");
        assert!(words.ends_with("there are 8.00 GiB; --optimizer-state bf16 takes 1.84 GiB less"), "{words}");
        let words = with_moments(Dtype::Bf16, 6, None).unwrap_err().to_string();
        assert!(words.ends_with("there are 6.00 GiB"), "{words}");
    }
}
