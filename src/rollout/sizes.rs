//! Chooses the longest prompt and completion and the number of sequences at once: as requested, else what the model and the device have
//! room for.

use crate::error::{Error, Result};

/// Default of the longest prompt (tokens).
const PROMPT_TOKENS: usize = 512;
/// The same for a chat, which grows with every answer (tokens).
const CHAT_TOKENS: usize = 4096;
/// Default of the longest completion (tokens).
const COMPLETION_TOKENS: usize = 256;
/// Default of the sequences at once.
const SEQUENCES: usize = 64;

/// Sizes that the user may request. A default gives way to what fits; a requested size does not.
#[derive(Debug, Clone, Copy, Default)]
pub struct RequestedSizes {
    /// Longest prompt (tokens).
    pub prompt_tokens: Option<usize>,
    /// Longest completion, end token included (tokens).
    pub completion_tokens: Option<usize>,
    /// Sequences sampled at once.
    pub sequences: Option<usize>,
}

/// The longest prompt and the longest completion (tokens).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lengths {
    /// Of prompts; may be more than the positions beside a completion.
    pub prompt: usize,
    /// Of completions, end token included.
    pub completion: usize,
}

impl RequestedSizes {
    /// The sizes for chats: longer prompts than those of data, unless a length was requested.
    #[must_use]
    pub fn for_chats(self) -> Self {
        Self { prompt_tokens: self.prompt_tokens.or(Some(CHAT_TOKENS)), ..self }
    }

    /// Chooses the lengths for a model with `positions` positions. Without a request, prompts get at least half of them.
    ///
    /// # Errors
    /// [`Error::Usage`] when the requested completions leave no room for a prompt.
    pub fn lengths(&self, positions: usize) -> Result<Lengths> {
        let for_prompts = self.prompt_tokens.filter(|&tokens| tokens < positions);
        let for_prompts = for_prompts.unwrap_or_else(|| PROMPT_TOKENS.min(positions.div_ceil(2)));
        let completion = self.completion_tokens.unwrap_or_else(|| COMPLETION_TOKENS.min(positions - for_prompts));
        if completion >= positions || completion == 0 {
            return Err(Error::Usage(format!(
                "--max-completion-tokens {completion} leaves no room for a prompt: the model has {positions} positions, so at \
                 most {} fit",
                positions - 1
            )));
        }
        Ok(Lengths { prompt: self.prompt_tokens.unwrap_or(PROMPT_TOKENS), completion })
    }

    /// Chooses the sequences at once: as requested, else the default, halved until `fits` accepts it.
    ///
    /// # Errors
    /// Those of `fits`.
    pub fn sequences(&self, fits: impl Fn(usize) -> Result<bool>) -> Result<usize> {
        if let Some(sequences) = self.sequences {
            return Ok(sequences);
        }
        let mut sequences = SEQUENCES;
        while sequences > 1 && !fits(sequences)? {
            sequences /= 2;
        }
        Ok(sequences)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(prompt_tokens: Option<usize>, completion_tokens: Option<usize>, positions: usize) -> (usize, usize) {
        let lengths = RequestedSizes { prompt_tokens, completion_tokens, sequences: None }.lengths(positions).unwrap();
        (lengths.prompt, lengths.completion)
    }

    #[test]
    fn defaults_give_way_to_a_small_model() {
        assert_eq!(lengths(None, None, 32_768), (512, 256));
        for (positions, completion) in [(600, 256), (256, 128), (3, 1), (2, 1)] {
            assert_eq!(lengths(None, None, positions), (512, completion));
        }
    }

    #[test]
    fn what_was_asked_for_stays_and_the_other_length_gives_way() {
        assert_eq!(lengths(Some(200), None, 256), (200, 56));
        assert_eq!(lengths(Some(96), None, 256), (96, 160));
        assert_eq!(lengths(None, Some(200), 256), (512, 200));
        assert_eq!(lengths(Some(1000), None, 256), (1000, 128), "a limit that no prompt reaches does no harm");
        assert_eq!(
            lengths(Some(200), Some(100), 256),
            (200, 100),
            "a prompt that is too long is refused when it comes"
        );
    }

    #[test]
    fn completions_that_leave_no_room_are_refused_with_what_fits() {
        for (tokens, positions) in [(256, 256), (300, 256), (1, 1)] {
            let refused = RequestedSizes { completion_tokens: Some(tokens), ..RequestedSizes::default() }
                .lengths(positions)
                .unwrap_err();
            assert_eq!(refused.exit_code(), 2);
            let fit = format!("has {positions} positions, so at most {} fit", positions - 1);
            assert!(refused.to_string().ends_with(&fit), "{refused}");
        }
    }

    #[test]
    fn only_a_default_number_of_sequences_is_lowered_until_it_fits() {
        let at_most = |most| move |sequences| Ok(sequences <= most);
        let asked = |sequences| RequestedSizes { sequences, ..RequestedSizes::default() };
        assert_eq!(asked(None).sequences(at_most(1000)).unwrap(), 64);
        assert_eq!(asked(None).sequences(at_most(20)).unwrap(), 16);
        assert_eq!(asked(None).sequences(at_most(0)).unwrap(), 1, "the plan says what does not fit");
        assert_eq!(asked(Some(48)).sequences(at_most(20)).unwrap(), 48);
    }
}
