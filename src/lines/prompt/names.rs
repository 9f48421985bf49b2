//! What a prompt is called: its samples are drawn by this name, so two prompts of a step never share one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::Prompt;
use crate::error::Result;
use crate::lines::record::{Message, Record};

/// Hexadecimal digits of a prompt's hash.
const DIGITS: usize = 16;

/// Names prompts one after the other. One without a `prompt_id` gets the hash of its messages, and where it comes again a number from 2
/// on behind it.
pub struct Names {
    unique_among: Option<usize>,
    /// How many prompts wanted the name so far.
    seen: HashMap<String, u64>,
}

impl Names {
    /// Nothing named yet. A name stands once among so many prompts, from the first on, and the count of those that come again begins
    /// anew with them: a step of a run is named alike whether steps came before it in this process or not. Without a number it stands
    /// once at all.
    #[must_use]
    pub fn new(unique_among: Option<usize>) -> Self {
        Self { unique_among, seen: HashMap::new() }
    }

    /// The name of the next prompt.
    ///
    /// # Errors
    /// [`crate::Error::Record`] for a `prompt_id` that occurred already.
    pub fn name(&mut self, record: &Record<'_>, prompt: &Prompt) -> Result<String> {
        self.next(record, || Ok(hash(&prompt.messages)))
    }

    /// The same for a record whose prompt need not be read where it has a name.
    ///
    /// # Errors
    /// As [`Names::name`], and for a record without a name as [`Prompt::of`].
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
                    None => "run rollout once an epoch",
                    Some(_) => "order the prompts so that a step has it once",
                };
                let name = taken.key();
                Err(record.error(format!("prompt_id {name} again: it would give the same samples; {remedy}")))
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

/// The same wherever the messages stood, and in whatever form.
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
        assert!(refused.contains("-2 again: it would give the same samples; run rollout once an epoch"), "{refused}");
    }
}
