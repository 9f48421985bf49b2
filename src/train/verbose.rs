//! Prints a sample of a step: a question, its answer, a response and what was extracted, as the notebooks do.

use crate::grpo::completion::ScoredCompletion;
use crate::grpo::groups::Group;
use crate::lines::prompt;
use crate::lines::record::Record;

/// The first completion of a step as text of several lines; `None` if its record has no completion.
#[must_use]
pub fn sample(step: u64, groups: &[Group]) -> Option<String> {
    let completion = groups.first()?.completions.first()?;
    let record = completion.line.record().ok()?;
    text(step, completion, &record).ok().flatten()
}

fn text(step: u64, completion: &ScoredCompletion, record: &Record<'_>) -> crate::Result<Option<String>> {
    let Some(response) = prompt::completion(record)? else { return Ok(None) };
    let question = question(&record.get_optional("prompt")?.unwrap_or_default());
    let or_none = |text: Option<std::borrow::Cow<'_, str>>| text.map_or_else(|| "(none)".into(), |text| plain(&text));
    let (answer, extracted) = (or_none(record.answer()?), or_none(record.get_text("extracted")?));
    let reward = completion.reward.map_or("null".into(), |reward| format!("{reward:.3}"));
    let rule = "-".repeat(20);
    let response = plain(&response);
    Ok(Some(format!(
        "{rule} step {step}\nQuestion:\n{}\n\nAnswer:\n{answer}\n\nResponse (reward {reward}):\n{response}\n\nExtracted:\n{extracted}",
        plain(&question)
    )))
}

/// The last message, or the whole of a prompt that is a text.
fn question(prompt: &serde_json::Value) -> String {
    let last = prompt.as_array().and_then(|messages| messages.last()).map_or(prompt, |message| &message["content"]);
    last.as_str().map_or_else(|| last.to_string(), str::to_owned)
}

/// A text without what a terminal would obey.
fn plain(text: &str) -> String {
    let escape = |c: char| if c.is_control() && c != '\n' { c.escape_default().to_string() } else { c.into() };
    text.chars().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_question_is_the_last_message_and_no_terminal_obeys_it() {
        assert_eq!(question(&serde_json::json!([{"role": "system", "content": "x"}, {"content": "why?"}])), "why?");
        assert_eq!(question(&"why?".into()), "why?");
        assert_eq!(plain("a\u{1b}[31m\nb\r"), "a\\u{1b}[31m\nb\\r");
    }
}
