//! The causes by name, and the advice for each.

/// Why a run learns nothing, or not what it should. The first that holds is named: the later ones may be its consequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// No completion of the step has a reward.
    RewardNull,
    /// Every completion of the step was cut off.
    AllTruncated,
    /// The policy samples nearly the same completion every time.
    EntropyCollapse,
    /// All rewards are equal within every group of the last steps.
    NoSignal,
    /// The log-probabilities of sampler and trainer differ so much that a step may soon be refused.
    SamplerMismatch,
    /// Rewards for format rise, and the reward for the answer does not.
    FormatOnly,
}

impl Cause {
    pub(super) const COUNT: usize = Self::FormatOnly as usize + 1;

    /// Each of them.
    pub(super) const ALL: [Self; Self::COUNT] = [
        Self::RewardNull,
        Self::AllTruncated,
        Self::EntropyCollapse,
        Self::NoSignal,
        Self::SamplerMismatch,
        Self::FormatOnly,
    ];

    /// The cause of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cause| cause.name() == name)
    }

    /// Its name in the metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RewardNull => "reward_null",
            Self::AllTruncated => "all_truncated",
            Self::EntropyCollapse => "entropy_collapse",
            Self::NoSignal => "no_signal",
            Self::SamplerMismatch => "sampler_mismatch",
            Self::FormatOnly => "format_only",
        }
    }

    /// What happens, and what to do about it.
    #[must_use]
    pub fn advice(self) -> &'static str {
        match self {
            Self::RewardNull => {
                "no completion has a reward, all are null: see the messages of the scorer, and check that the prompts have an `answer`"
            }
            Self::AllTruncated => {
                "every completion was cut off at the length limit: raise --max-completion-tokens of rollout, or check that the \
                 model's end token is in generation_config.json"
            }
            Self::EntropyCollapse => {
                "entropy is below a twentieth of its initial value, so that completions hardly differ: fork from an earlier checkpoint \
                 with a lower --learning-rate, with --beta, or with a higher --epsilon-high"
            }
            Self::NoSignal => {
                "all rewards are equal within every group, so that nothing is learned: use problems that are neither too easy nor too \
                 hard, more completions per prompt, or a reward that tells them apart"
            }
            Self::SamplerMismatch => {
                "log-probabilities of sampler and trainer differ by more than half of --logprob-band: sample with a more precise \
                 --dtype before a step is refused"
            }
            Self::FormatOnly => {
                "rewards for format rise and correctness does not, so that the policy learns only what an answer looks like: give \
                 correctness more weight, and read some of rollouts/"
            }
        }
    }
}
