//! Turns a row into a prompt record.

use serde::Serialize;

use super::demonstration::{Sloppiness, demonstration, in_format};
use super::{Row, final_answer};
use crate::lines::record::Message;

/// The system prompt of the notebooks that this project replaces, including the line breaks at both ends.
pub const SYSTEM_PROMPT: &str = "
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
";

const EXAMPLE_QUESTION: &str =
    "A baker fills 3 trays with 12 rolls each and then sells 20 rolls. How many rolls are left?";
const EXAMPLE_REASONING: &str = "Three trays hold 3 * 12 = 36 rolls.\nAfter the sale 36 - 20 = 16 rolls are left.";
const EXAMPLE_ANSWER: &str = "16";

/// How to turn rows into records.
#[derive(Debug, Clone)]
pub struct PromptStyle {
    /// The data set's name, which begins each `prompt_id`.
    pub name: String,
    /// The system message; no message if empty.
    pub system: String,
    /// Whether the question is the whole prompt, as a text, without any message.
    pub as_text: bool,
    /// Whether a worked example precedes the question.
    pub one_shot: bool,
    /// Whether to add a demonstration, and how sloppy it may be.
    pub demonstrations: Option<Sloppiness>,
    /// Seed of the demonstrations' sloppiness.
    pub seed: u64,
}

#[derive(Serialize)]
struct PromptRecord<'a> {
    prompt_id: String,
    prompt: Prompt<'a>,
    answer: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    completion: Option<String>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Prompt<'a> {
    Text(&'a str),
    Messages(Vec<Message>),
}

/// The fields that a prompt record defines.
const OWN_FIELDS: [&str; 4] = ["prompt_id", "prompt", "answer", "completion"];

impl PromptStyle {
    /// Whether a row has what its record needs: an answer and, for a demonstration, reasoning.
    #[must_use]
    pub fn suits(&self, row: &Row) -> bool {
        let reasoning = row.answer.split("####").next().unwrap_or_default();
        final_answer(&row.answer).is_some_and(|answer| !answer.is_empty())
            && (self.demonstrations.is_none() || !reasoning.trim().is_empty())
    }

    /// The record of a row as one line of JSON, `None` if the row has no answer. `split` is the published split. A prompt is the same in
    /// each epoch; a sloppy demonstration is not.
    #[must_use]
    pub fn record(&self, row: &Row, split: &str, epoch: u64) -> Option<Vec<u8>> {
        let record = PromptRecord {
            prompt_id: self.prompt_id(row, split),
            prompt: match self.as_text {
                true => Prompt::Text(&row.question),
                false => Prompt::Messages(self.messages(&row.question)),
            },
            answer: final_answer(&row.answer)?,
            completion: self.demonstrations.map(|sloppy| demonstration(row, sloppy, self.seed, epoch)),
        };
        let mut json = serde_json::to_vec(&record).expect("plain data serialises");
        json.pop();
        for (name, value) in row.extra.iter().filter(|(name, _)| !OWN_FIELDS.contains(&name.as_str())) {
            json.push(b',');
            serde_json::to_writer(&mut json, name).expect("a string serialises");
            json.push(b':');
            json.extend_from_slice(value.get().as_bytes());
        }
        json.push(b'}');
        Some(json)
    }

    /// The id of a row's prompt.
    pub(super) fn prompt_id(&self, row: &Row, split: &str) -> String {
        format!("{}/{split}/{}", self.name, row.index)
    }

    fn messages(&self, question: &str) -> Vec<Message> {
        let mut prompt = Vec::with_capacity(4);
        if !self.system.is_empty() {
            prompt.push(Message::new("system", &self.system));
        }
        if self.one_shot {
            prompt.push(Message::new("user", EXAMPLE_QUESTION));
            prompt.push(Message::new("assistant", in_format(EXAMPLE_REASONING, EXAMPLE_ANSWER)));
        }
        prompt.push(Message::new("user", question));
        prompt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        let answer = "He has 48/2 = <<48/2=24>>24 pens.\n#### 24".into();
        let extra = vec![("level".into(), serde_json::from_str("1.10").unwrap())];
        Row { index: 17, question: "How \"many\"?".into(), answer, wording: 0, extra }
    }

    fn style(system: &str, one_shot: bool, demonstrations: Option<Sloppiness>) -> PromptStyle {
        let (name, system) = ("gsm8k".into(), system.into());
        PromptStyle { name, system, as_text: false, one_shot, demonstrations, seed: 1 }
    }

    #[test]
    fn a_record_has_the_contracts_fields_and_keeps_the_rows_own() {
        let json = style("S", false, None).record(&row(), "train", 0).unwrap();
        let expected = r#"{"prompt_id":"gsm8k/train/17","prompt":[{"role":"system","content":"S"},{"role":"user","content":"How \"many\"?"}],"answer":"24","level":1.10}"#;
        assert_eq!(String::from_utf8(json).unwrap(), expected);
    }

    #[test]
    fn an_empty_system_prompt_is_no_message_and_one_shot_is_two() {
        let json = style("", true, Some(Sloppiness::default())).record(&row(), "test", 3).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&json).unwrap();
        let roles: Vec<_> = value["prompt"].as_array().unwrap().iter().map(|m| m["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["user", "assistant", "user"]);
        let example = value["prompt"][1]["content"].as_str().unwrap();
        assert!(example.starts_with("<reasoning>\n") && example.ends_with("\n</reasoning>\n<answer>\n16\n</answer>\n"));
        let completion = "<reasoning>\nHe has 48/2 = 24 pens.\n</reasoning>\n<answer>\n24\n</answer>\n";
        assert_eq!(value["completion"], completion);
    }

    #[test]
    fn a_row_without_an_answer_has_no_record() {
        assert!(style("", false, None).record(&Row { answer: "24".into(), ..row() }, "train", 0).is_none());
    }
}
