//! What each metric means, and which course of it is a bad sign.

use crate::run::HELD_OUT;

/// A part of the page with the metrics that it shows.
pub struct Section {
    /// Its heading.
    pub title: &'static str,
    /// Whether it is unfolded at first.
    pub is_open: bool,
}

/// What there is to know of a metric.
pub struct Meaning {
    /// Index of its section.
    pub section: usize,
    /// What it measures.
    pub means: &'static str,
    /// When to worry.
    pub bad: &'static str,
}

/// The sections, in their order on the page.
pub const SECTIONS: [Section; 6] = [
    Section { title: "Rewards", is_open: true },
    Section { title: "Policy", is_open: true },
    Section { title: "Completions", is_open: true },
    Section { title: "Optimizer", is_open: false },
    Section { title: "Sampler against trainer", is_open: false },
    Section { title: "Other metrics", is_open: false },
];

/// Metrics by name; `*` stands for a reward's name. They come in this order within their section.
const MEANINGS: [(&str, usize, &str, &str); 41] = [
    (
        HELD_OUT,
        0,
        "Strict accuracy of sampled completions of held-out problems: before, after, and with EVALUATE_EVERY in between.",
        "It does not follow the reward: what is rewarded is not the answer, or the training problems are learned by heart.",
    ),
    ("reward", 0, "Mean reward of the step's completions.", "It stays flat for hundreds of steps, or falls."),
    (
        "rewards/*/mean",
        0,
        "Mean of this part of the reward, without its weight.",
        "It rises alone while correctness does not.",
    ),
    (
        "reward_std",
        0,
        "Standard deviation of the rewards.",
        "It reaches 0: completions no longer differ, so nothing is learned.",
    ),
    (
        "rewards/*/std",
        0,
        "Standard deviation of this part of the reward.",
        "It is 0 from the start: this part never tells completions apart.",
    ),
    (
        "frac_reward_zero_std",
        0,
        "Fraction of completions whose group has equal rewards, and so teaches nothing.",
        "It is near 1: the problems are too easy or too hard.",
    ),
    (
        "num_unscored",
        0,
        "Completions without a reward, which are left out.",
        "It is not 0 although every prompt has an answer.",
    ),
    (
        "entropy",
        1,
        "Mean entropy of the next token (nats): how much the policy explores.",
        "It falls towards 0 early, or grows without end.",
    ),
    (
        "kl",
        1,
        "Estimate of the KL divergence from the reference (nats per token).",
        "It grows fast: the policy forgets what it could do.",
    ),
    (
        "teacher_kl",
        1,
        "Estimate (k2) of the KL divergence from the teacher (nats per token).",
        "It does not fall: --distill or the learning rate is too small.",
    ),
    (
        "loss",
        1,
        "The loss of the update. In GRPO it starts near 0 and says little by itself.",
        "It jumps by orders of magnitude.",
    ),
    (
        "clip_ratio/region_mean",
        1,
        "Fraction of tokens whose ratio was clipped, on either side.",
        "It is above 0.2: steps are too large for their data.",
    ),
    ("clip_ratio/low_mean", 1, "Fraction of tokens clipped because they became too unlikely.", "It is above 0.1."),
    ("clip_ratio/high_mean", 1, "Fraction of tokens clipped because they became too likely.", "It is above 0.1."),
    (
        "clip_ratio/low_min",
        1,
        "The smallest such fraction of a completion, below.",
        "It is far above 0: whole completions are clipped.",
    ),
    (
        "clip_ratio/high_max",
        1,
        "The largest such fraction of a completion, above.",
        "It is 1: a whole completion is clipped.",
    ),
    (
        "completions/mean_length",
        2,
        "Mean length of a completion (tokens).",
        "It approaches the limit, or collapses to almost nothing.",
    ),
    (
        "completions/clipped_ratio",
        2,
        "Fraction of completions cut off at the length limit.",
        "It rises: answers are cut off before they come.",
    ),
    (
        "completions/min_length",
        2,
        "Length of the shortest completion (tokens).",
        "It falls to 1: some completions are empty.",
    ),
    ("completions/max_length", 2, "Length of the longest completion (tokens).", "It stays at the limit."),
    (
        "completions/mean_terminated_length",
        2,
        "Mean length of completions that ended by themselves (tokens).",
        "It is 0: none did.",
    ),
    (
        "completions/min_terminated_length",
        2,
        "Length of the shortest that ended by itself (tokens).",
        "It is 0: none did.",
    ),
    (
        "completions/max_terminated_length",
        2,
        "Length of the longest that ended by itself (tokens).",
        "It is 0: none did.",
    ),
    (
        "grad_norm",
        3,
        "Norm of the gradient before clipping.",
        "It has spikes of a hundred times its usual size, or is 0.",
    ),
    ("learning_rate", 3, "Learning rate of the update.", "It is not the schedule you meant."),
    ("num_tokens", 3, "Tokens of prompts and completions trained on so far.", "It is flat: nothing is trained."),
    (
        "loss_scale",
        3,
        "Factor of the gradients in f16, which keeps small ones from vanishing.",
        "It keeps falling: the gradients overflow.",
    ),
    ("skipped_updates", 3, "Updates skipped so far because gradients overflowed.", "It keeps rising."),
    (
        "sampling/sampling_logp_difference/mean",
        4,
        "Mean difference between the log-probabilities of sampler and trainer for the same weights (nats).",
        "It nears --logprob-band, beyond which a step is refused.",
    ),
    (
        "sampling/sampling_logp_difference/max",
        4,
        "The largest such difference (nats).",
        "It is above 1 for many steps.",
    ),
    (
        "sampling/importance_sampling_ratio/mean",
        4,
        "Mean ratio of the policy in training to the one that sampled.",
        "It is far from 1: the samples are too old.",
    ),
    (
        "sampling/importance_sampling_ratio/min",
        4,
        "The smallest such ratio of a token.",
        "It is near 0 for many steps.",
    ),
    ("sampling/importance_sampling_ratio/max", 4, "The largest such ratio of a token.", "It stays at the bound."),
    (
        "sampling/importance_sampling_ratio/clipped_ratio",
        4,
        "Fraction of tokens whose ratio was bounded.",
        "It is above 0.1: samples are too old.",
    ),
    (
        "sampling/staleness/mean",
        4,
        "How many steps older the sampling weights are, on average.",
        "It is more than MAX_STALENESS.",
    ),
    (
        "sampling/staleness/max",
        4,
        "The most steps by which the sampling weights are older.",
        "It is more than MAX_STALENESS.",
    ),
    (
        "dynamic_sampling/groups_sampled",
        4,
        "Groups that the step sampled to find enough whose rewards differ.",
        "It stays at the budget: the problems are too easy or too hard.",
    ),
    (
        "dynamic_sampling/groups_trained",
        4,
        "Groups that it was trained on.",
        "It is below PROMPTS_PER_STEP: the budget was too small.",
    ),
    ("mean_token_accuracy", 5, "Fraction of tokens that the model finds likeliest.", "It stays flat."),
    ("epoch", 5, "Passes over the prompts.", "It is above 10: prompts are learned by heart."),
    ("policy_step", 5, "Steps of the run; each may make several updates.", "It stops."),
];

/// What a metric means, and its rank in the order of the page. Unknown ones come last.
#[must_use]
pub fn of(name: &str) -> (usize, Meaning) {
    let found = MEANINGS.iter().position(|(known, ..)| matches(known, name));
    match found {
        Some(rank) => {
            let (_, section, means, bad) = MEANINGS[rank];
            (rank, Meaning { section, means, bad })
        }
        None => (MEANINGS.len(), Meaning { section: SECTIONS.len() - 1, means: "", bad: "" }),
    }
}

fn matches(known: &str, name: &str) -> bool {
    match known.split_once('*') {
        Some((begin, end)) => name.len() > begin.len() + end.len() && name.starts_with(begin) && name.ends_with(end),
        None => known == name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reward_of_any_name_has_a_meaning_and_others_come_last() {
        assert!(of("rewards/my/own/mean").1.means.contains("part of the reward"));
        assert!(of("reward").0 < of("rewards/a/mean").0 && of("rewards/a/mean").0 < of("rewards/a/std").0);
        assert_eq!(of("rewards//mean").0, MEANINGS.len());
        assert_eq!(of("tokens_per_day").1.section, SECTIONS.len() - 1);
    }
}
