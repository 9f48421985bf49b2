//! The losses by name, and what each one is made of.

/// What a token's loss is, and how the losses of tokens are averaged to the loss of a step. Masked and unscored completions have no
/// tokens here.
///
/// # Source
/// TRL `GRPOTrainer`, `loss_type`; Shao et al. 2024, <https://arxiv.org/abs/2402.03300> (GRPO); Liu et al. 2025,
/// <https://arxiv.org/abs/2503.20783> (Dr. GRPO); Yu et al. 2025, <https://arxiv.org/abs/2503.14476> (DAPO); MiniMax 2025,
/// <https://arxiv.org/abs/2506.13585> (CISPO); Gao et al. 2025, <https://arxiv.org/abs/2511.20347> (SAPO); Zheng et al. 2025,
/// <https://arxiv.org/abs/2507.18071> (GSPO); LUSPO, <https://arxiv.org/abs/2602.05261>.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum LossKind {
    /// Mean over completions of the mean over each one's tokens: a token of a long completion weighs less
    Grpo,
    /// The same number as dapo. In TRL bnpo takes the mean over each micro-batch, so that its size changes the loss; here it is always
    /// the whole step
    Bnpo,
    /// Sum over all tokens / (completions * --max-completion-tokens): a token's weight depends on no length
    DrGrpo,
    /// Mean over all tokens of the step: each token weighs the same
    Dapo,
    /// As dapo, but the ratio is a constant weight of the token's log-probability, at most --epsilon-high: no token loses its gradient
    Cispo,
    /// As grpo, but the gain fades smoothly as the ratio leaves 1, instead of being clipped
    Sapo,
    /// As grpo, with one ratio for the whole completion: the geometric mean of its tokens'
    Gspo,
    /// As gspo, but a completion weighs as much as it has tokens
    Luspo,
}

/// How the losses of tokens are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Average {
    /// Over a completion's tokens, then over completions.
    OverCompletions,
    /// Over all tokens.
    OverTokens,
    /// Over completions of the longest length.
    OverLongest,
    /// Over completions, of the sums over their tokens.
    OfSums,
}

/// What rises with the probability of a token of positive advantage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Objective {
    /// The ratio, until it leaves the clip range.
    Clipped,
    /// The log-probability, times the truncated ratio.
    WeightedLogprob,
    /// A sigmoid of the ratio.
    Soft,
}

/// Whose probability ratio weighs a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum RatioLevel {
    /// The token's own
    Token,
    /// The geometric mean over the completion's tokens: one number, whose gradient reaches all of them (GSPO)
    Sequence,
    /// The same number, with the gradient of each token for itself (GSPO-token)
    SequenceToken,
}

impl LossKind {
    /// How it averages, what it averages, and whose ratio that depends on.
    pub(super) fn parts(self) -> (Average, Objective, RatioLevel) {
        use {Average::*, Objective::*, RatioLevel::*};
        match self {
            Self::Grpo => (OverCompletions, Clipped, Token),
            Self::Bnpo | Self::Dapo => (OverTokens, Clipped, Token),
            Self::DrGrpo => (OverLongest, Clipped, Token),
            Self::Cispo => (OverTokens, WeightedLogprob, Token),
            Self::Sapo => (OverCompletions, Soft, Token),
            Self::Gspo => (OverCompletions, Clipped, Sequence),
            Self::Luspo => (OfSums, Clipped, Sequence),
        }
    }
}
