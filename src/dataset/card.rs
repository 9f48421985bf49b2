//! The card of a data set, as the Hugging Face Hub shows it.

use super::{Counts, FILES};

/// The text of `README.md`: what the Hub reads of it, then what people do.
pub(super) fn card(counts: &Counts, sources: &[String]) -> String {
    let Counts { questions, questions_kept, completions, unscored, wrong, truncated, duplicates, kept } = counts;
    let [messages, share_gpt] = FILES;
    let sources: String = sources.iter().map(|source| format!("* {source}\n")).collect();
    format!(
        "---
task_categories:
- text-generation
tags:
- reasoning
- synthetic
configs:
- config_name: default
  data_files: {messages}
- config_name: sharegpt
  data_files: {share_gpt}
---

# Reasoning of a language model that came to the right answer

Each row is a question with one sampled completion, whose answer was compared with a reference. `{messages}` has `messages`, as TRL's
`SFTTrainer` reads them; `{share_gpt}` has the same rows as ShareGPT's `conversations`. Rows of one question share a `prompt_id` (`id`).

| | completions |
|---|---|
| sampled, for {questions} questions | {completions} |
| without a reference to compare with | {unscored} |
| wrong | {wrong} |
| right, but cut off | {truncated} |
| right, and much like another (80 % of their phrases of three words) | {duplicates} |
| **kept, for {questions_kept} questions** | **{kept}** |

Sampled by grpo-pipes from:

{sources}"
    )
}
