//! How long sequences get and how many are sampled at once: what was asked for, else what the model and the device have room for.

use crate::error::{Error, Result};

/// Longest prompt, where nobody says [tokens].
const PROMPT_TOKENS: usize = 512;
/// Longest completion [tokens].
const COMPLETION_TOKENS: usize = 256;
/// Sequences at once.
const SEQUENCES: usize = 64;

/// What somebody asked for. A default gives way to what the model has room for; this does not.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked {
    /// Longest prompt [tokens].
    pub prompt_tokens: Option<usize>,
    /// Longest completion, end token included [tokens].
    pub completion_tokens: Option<usize>,
    /// Sequences sampled at once.
    pub sequences: Option<usize>,
}

impl Asked {
    /// The longest prompt, as far as the positions beside a completion allow it, and the longest completion in a model of so many
    /// positions. Where neither was asked for, prompts get at least half of the positions.
    ///
    /// # Errors
    /// [`Error::Usage`] when the completions asked for leave no room for a prompt.
    pub fn lengths(&self, positions: usize) -> Result<(usize, usize)> {
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
        Ok((self.prompt_tokens.unwrap_or(PROMPT_TOKENS), completion))
    }

    /// Sequences at once: as asked, or the most, halved until they fit, that somebody may want.
    pub fn sequences(&self, fit: impl Fn(usize) -> Result<bool>) -> Result<usize> {
        let mut sequences = self.sequences.unwrap_or(SEQUENCES);
        while self.sequences.is_none() && sequences > 1 && !fit(sequences)? {
            sequences /= 2;
        }
        Ok(sequences)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(prompt_tokens: Option<usize>, completion_tokens: Option<usize>, positions: usize) -> (usize, usize) {
        Asked { prompt_tokens, completion_tokens, sequences: None }.lengths(positions).unwrap()
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
            let refused = Asked { completion_tokens: Some(tokens), ..Asked::default() }.lengths(positions).unwrap_err();
            assert_eq!(refused.exit_code(), 2);
            let fit = format!("has {positions} positions, so at most {} fit", positions - 1);
            assert!(refused.to_string().ends_with(&fit), "{refused}");
        }
    }

    #[test]
    fn only_a_default_number_of_sequences_is_lowered_until_it_fits() {
        let at_most = |most| move |sequences| Ok(sequences <= most);
        let asked = |sequences| Asked { sequences, ..Asked::default() };
        assert_eq!(asked(None).sequences(at_most(1000)).unwrap(), 64);
        assert_eq!(asked(None).sequences(at_most(20)).unwrap(), 16);
        assert_eq!(asked(None).sequences(at_most(0)).unwrap(), 1, "the plan says what does not fit");
        assert_eq!(asked(Some(48)).sequences(at_most(20)).unwrap(), 48);
    }
}
