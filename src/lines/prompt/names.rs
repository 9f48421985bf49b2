//! Names prompts. The name seeds the draws of a prompt's samples, so two prompts of a step never share one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::Prompt;
use crate::error::Result;
use crate::lines::record::{Message, Record};

/// Hexadecimal digits of a prompt's hash.
const DIGITS: usize = 16;

/// Names prompts in turn. A prompt without a `prompt_id` is named by the hash of its messages; repetitions get a suffix: -2, -3, and so on.
pub struct Names {
    unique_among: Option<usize>,
    /// How many prompts wanted each name so far.
    seen: HashMap<String, u64>,
}

impl Names {
    /// Makes names that are unique among all prompts, or within each `unique_among` consecutive prompts: the prompts of a step are named
    /// alike, whether or not this process sampled the steps before.
    #[must_use]
    pub fn new(unique_among: Option<usize>) -> Self {
        Self { unique_among, seen: HashMap::new() }
    }

    /// Names the next prompt.
    ///
    /// # Errors
    /// [`crate::Error::Record`] for a `prompt_id` that occurred already.
    pub fn name(&mut self, record: &Record<'_>, prompt: &Prompt) -> Result<String> {
        self.next(record, || Ok(hash(&prompt.messages)))
    }

    /// Like [`Names::name`], but reads the prompt of the record only if it has no `prompt_id`.
    ///
    /// # Errors
    /// Those of [`Names::name`], and of [`Prompt::of`].
    pub fn name_of(&mut self, record: &Record<'_>) -> Result<String> {
        self.next(record, || Ok(hash(&Prompt::of(record)?.messages)))
    }

    fn next(&mut self, record: &Record<'_>, hash: impl FnOnce() -> Result<String>) -> Result<String> {
        if Some(self.seen.len()) == self.unique_among {
            self.seen.clear(); // each prompt has one entry
        }
        match record.get_optional::<String>("prompt_id")? {
            Some(given) => self.given(record, given),
            None => Ok(self.numbered(hash()?)),
        }
    }

    fn given(&mut self, record: &Record<'_>, name: String) -> Result<String> {
        match self.seen.entry(name) {
            Entry::Vacant(free) => {
                let name = free.key().clone();
                free.insert(1);
                Ok(name)
            }
            Entry::Occupied(taken) => {
                let remedy = match self.unique_among {
                    None => "run rollout once per epoch",
                    Some(_) => "order the prompts so that a step has it once",
                };
                let name = taken.key();
                Err(record.error(format!("prompt_id {name} occurs again and would get the same samples; {remedy}")))
            }
        }
    }

    fn numbered(&mut self, hash: String) -> String {
        let mut name = hash.clone();
        while self.seen.contains_key(&name) {
            let count = self.seen.entry(hash.clone()).or_default();
            *count += 1;
            name = format!("{hash}-{count}");
        }
        self.seen.insert(name.clone(), 1);
        name
    }
}

impl Prompt {
    /// The name of a prompt without a `prompt_id`, the first time that it comes.
    #[must_use]
    pub fn name(&self) -> String {
        hash(&self.messages)
    }
}

/// Hashes messages, which are the same whatever form they came in.
fn hash(messages: &[Message]) -> String {
    let canonical = serde_json::to_vec(messages).expect("plain data serialises");
    blake3::hash(&canonical).to_hex()[..DIGITS].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lines::record::Line;

    fn name(names: &mut Names, text: &str) -> std::result::Result<String, String> {
        let line = Line { path: "-".into(), number: 1, text: text.into() };
        names.name_of(&line.record().unwrap()).map_err(|err| err.to_string())
    }

    fn names(among: Option<usize>, texts: &[&str]) -> Vec<String> {
        let mut names = Names::new(among);
        texts.iter().map(|text| name(&mut names, text).unwrap()).collect()
    }

    const A: &str = r#"{"prompt":"a"}"#;
    const B: &str = r#"{"prompt":"b"}"#;

    #[test]
    fn a_prompt_has_the_same_name_in_every_form() {
        let forms = [
            A,
            r#"{"answer":"7", "prompt":[{"content":"a","name":null,"role":"user"}]}"#,
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"}]},{"role":"assistant","content":"x"}]}"#,
            r#"{"prompt_id":null,"conversations":[{"from":"human","value":"a"}]}"#,
        ];
        for form in forms {
            assert_eq!(names(None, &[form]), ["80e4477e72d4f291"], "{form}");
        }
        let others = [B, r#"{"prompt":[{"role":"system","content":"a"}]}"#, r#"{"prompt":"a "}"#];
        for other in others {
            assert_ne!(names(None, &[other]), names(None, &[A]), "{other}");
        }
    }

    #[test]
    fn what_comes_again_is_numbered_anew_in_each_step() {
        let base = |text| names(None, &[text]).remove(0);
        let (a, b) = (base(A), base(B));
        let again = |count: u64| format!("{a}-{count}");
        assert_eq!(names(None, &[A, A, B, A]), [a.clone(), again(2), b.clone(), again(3)]);
        let steps = names(Some(3), &[A, A, B, A, A, A]);
        assert_eq!(steps, [a.clone(), again(2), b, a.clone(), again(2), again(3)]);
        assert_eq!(steps[3..], names(Some(3), &[A, A, A]), "as after a resume");
    }

    #[test]
    fn a_number_gives_way_to_a_name_that_was_given_and_a_given_name_stands_once() {
        let a = names(None, &[A]).remove(0);
        let given = format!(r#"{{"prompt_id":"{a}-2","prompt":"x"}}"#);
        assert_eq!(names(None, &[&given, A, A, A])[1..], [a.clone(), format!("{a}-3"), format!("{a}-4")]);
        let mut some = Names::new(None);
        for text in [A, A] {
            name(&mut some, text).unwrap();
        }
        let refused = name(&mut some, &given).unwrap_err();
        assert!(
            refused.contains("-2 occurs again and would get the same samples; run rollout once per epoch"),
            "{refused}"
        );
    }
}
