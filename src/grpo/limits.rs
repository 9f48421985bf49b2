//! Checks that a sequence fits the model.

/// Limits that the model sets to a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceLimits {
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// The most tokens of a prompt with its completion.
    pub positions: usize,
}

impl SequenceLimits {
    /// Refuses a sequence that is too long, or has a token that the model does not know, in words that an error can end with.
    pub(crate) fn check(self, prompt: &[u32], completion: &[u32]) -> Result<(), String> {
        let Self { vocab_size, positions } = self;
        if let Some(token) = prompt.iter().chain(completion).find(|token| **token as usize >= vocab_size) {
            return Err(format!("token {token} is not in the policy's vocabulary of {vocab_size}"));
        }
        let length = prompt.len() + completion.len();
        if length > positions {
            return Err(format!("{length} tokens; the policy has {positions} positions"));
        }
        Ok(())
    }
}
