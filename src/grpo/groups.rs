//! Reads scored rollouts as complete groups that fit the model, and refuses others by file and line.

use std::borrow::Borrow;
use std::collections::{HashSet, VecDeque};

use crate::error::{Error, Result};
use crate::grpo::completion::{ScoredCompletion, need};
use crate::grpo::limits::SequenceLimits;
use crate::lines::jsonl::Input;
use crate::lines::record::{Line, Record};

/// All completions of one prompt, in the order of their `sample_index`.
#[derive(Debug, Clone)]
pub struct Group {
    /// The `group_id` of its records.
    pub id: String,
    /// At least one.
    pub completions: Vec<ScoredCompletion>,
}

impl Group {
    /// Reads again what [`Groups`] has read: a whole group, by its lines in their order.
    ///
    /// # Errors
    /// Those of [`Groups`] for a line.
    pub fn of(id: String, lines: &[Line], limits: SequenceLimits) -> Result<Self> {
        let completion = |line: &Line| ScoredCompletion::parse(line, &line.record()?, limits);
        Ok(Self { id, completions: lines.iter().map(completion).collect::<Result<_>>()? })
    }
}

/// Checks that a record, given with its sample index and group size, is the one that comes next.
pub type CheckOrder = Box<dyn FnMut(&Record<'_>, u64, usize) -> Result<()> + Send>;

/// Reads complete groups from an input, in the order of their first records. Records of several groups may be interleaved.
pub struct Groups {
    input: Input,
    limits: SequenceLimits,
    order: Option<CheckOrder>,
    open: VecDeque<OpenGroup>,
    seen: HashSet<String>,
}

struct OpenGroup {
    group: Group,
    size: usize,
}

impl Groups {
    /// Reads groups that fit a policy's limits.
    #[must_use]
    pub fn new(input: Input, limits: SequenceLimits) -> Self {
        Self { input, limits, order: None, open: VecDeque::new(), seen: HashSet::new() }
    }

    /// Refuses records in any other order too.
    #[must_use]
    pub fn in_order(self, check: CheckOrder) -> Self {
        Self { order: Some(check), ..self }
    }

    fn next_group(&mut self) -> Result<Option<Group>> {
        loop {
            if self.open.front().is_some_and(|first| first.group.completions.len() == first.size) {
                let mut group = self.open.pop_front().expect("just looked at").group;
                group.completions.sort_by_key(|completion| completion.sample_index);
                return Ok(Some(group));
            }
            match self.input.next() {
                Some(line) => self.add(&line?)?,
                None => return self.open.front().map_or(Ok(None), |first| Err(incomplete(first))),
            }
        }
    }

    fn add(&mut self, line: &Line) -> Result<()> {
        let record = line.record()?;
        let id: String = need(&record, "group_id", "which completions are of one prompt")?;
        let size: usize = need(&record, "group_size", "how many completions the group has")?;
        let completion = ScoredCompletion::parse(line, &record, self.limits)?;
        if let Some(check) = &mut self.order {
            check(&record, completion.sample_index, size)?;
        }
        let sample = completion.sample_index;
        let refuse = |what: String| Err(record.error(format!("group {id}: {what}")));
        if let Some(open) = self.open.iter_mut().find(|open| open.group.id == id) {
            if open.size != size {
                return refuse(format!("group_size {size} here, {} before", open.size));
            }
            if open.group.completions.iter().any(|other| other.sample_index == sample) {
                return refuse(format!("sample_index {sample} stands twice"));
            }
            if open.group.completions.len() == size {
                return refuse(format!("more than its {size} samples"));
            }
            open.group.completions.push(completion);
            return Ok(());
        }
        if size == 0 {
            return refuse("group_size 0".into());
        }
        if !self.seen.insert(id.clone()) {
            return refuse(format!("more than its {size} samples"));
        }
        let group = Group { id, completions: vec![completion] };
        self.open.push_back(OpenGroup { group, size });
        Ok(())
    }
}

impl Iterator for Groups {
    type Item = Result<Group>;

    fn next(&mut self) -> Option<Result<Group>> {
        self.next_group().transpose()
    }
}

/// A field that training needs; records of other samplers may lack it.
fn incomplete(open: &OpenGroup) -> Error {
    let (found, size) = (open.group.completions.len(), open.size);
    let last = open.group.completions.last().expect("opened by its first record");
    // An error of the input as a whole: its last line is correct.
    Error::Data(
        last.error(format!("group {}: {found} of {size} samples when the input ended", open.group.id)).to_string(),
    )
}

/// The completions of these groups, in their order.
pub fn completions<G: Borrow<Group>>(groups: &[G]) -> impl Iterator<Item = &ScoredCompletion> {
    groups.iter().flat_map(|group| &group.borrow().completions)
}

/// The temperature of a step's completions; 1 when there are none.
///
/// # Errors
/// [`Error::Record`] when they differ: the loss of a step assumes one distribution.
pub fn temperature<G: Borrow<Group>>(groups: &[G]) -> Result<f32> {
    let mut all = completions(groups);
    let Some(first) = all.next() else {
        return Ok(1.0);
    };
    match all.find(|other| other.temperature != first.temperature) {
        None => Ok(first.temperature),
        Some(other) => {
            Err(other
                .error(format!("temperature {} in a step that started with {}", other.temperature, first.temperature)))
        }
    }
}

/// Digest of a step's records, independent of their order within a group.
#[must_use]
pub fn digest<G: Borrow<Group>>(groups: &[G]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for completion in completions(groups) {
        hasher.update(blake3::hash(completion.line.text.as_bytes()).as_bytes());
    }
    hasher.finalize()
}

/// The values of each part of the rewards, one per completion, in the order of first appearance; `None` where one lacks it.
#[must_use]
pub fn parts<G: Borrow<Group>>(groups: &[G]) -> Vec<(String, Vec<Option<f64>>)> {
    let completions: Vec<_> = completions(groups).collect();
    let mut parts: Vec<(String, Vec<Option<f64>>)> = Vec::new();
    for (index, (name, value)) in
        completions.iter().enumerate().flat_map(|(index, one)| one.parts.iter().map(move |part| (index, part)))
    {
        let place = parts.iter().position(|(other, _)| other == name).unwrap_or_else(|| {
            parts.push((name.clone(), vec![None; completions.len()]));
            parts.len() - 1
        });
        parts[place].1[index] = Some(*value);
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpo::completion::Staleness;
    use std::io::Write;

    const LIMITS: SequenceLimits = SequenceLimits { vocab_size: 50, positions: 16 };

    fn record(group: &str, sample: u64, extra: &str) -> String {
        format!(
            r#"{{"group_id":"{group}","group_size":2,"sample_index":{sample},"policy_id":"p","policy_step":3,
            "temperature":0.9,"prompt_token_ids":[1],"completion_token_ids":[2,3],"logprobs":[-1,-0.5],
            "finish_reason":"length","reward":null{extra}}}"#
        )
        .replace('\n', " ")
    }

    fn read(lines: &[String]) -> Result<Vec<Group>> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(lines.join("\n").as_bytes()).unwrap();
        Groups::new(Input::open(file.path()).unwrap(), LIMITS).collect()
    }

    fn refusal(lines: &[String]) -> String {
        let error = read(lines).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        error.to_string().split_once(':').unwrap().1.to_owned()
    }

    #[test]
    fn mixed_records_come_out_as_whole_groups_in_the_order_of_their_first() {
        let lines = [record("a", 1, ""), record("b", 0, ""), record("b", 1, ""), record("a", 0, "")];
        let groups = read(&lines).unwrap();
        let shape: Vec<_> = groups.iter().map(|group| (group.id.as_str(), group.completions[0].sample_index)).collect();
        assert_eq!(shape, [("a", 0), ("b", 0)]);
        let first = &groups[0].completions[0];
        assert!(first.truncated && first.reward.is_none() && first.line.number == 4);
        assert_eq!((temperature(&groups).unwrap(), first.tokens.as_slice()), (0.9, [2, 3].as_slice()));
        let sorted = [record("a", 0, ""), record("a", 1, ""), record("b", 0, ""), record("b", 1, "")];
        assert_eq!(digest(&read(&sorted).unwrap()), digest(&groups));
    }

    #[test]
    fn a_group_that_is_not_whole_is_named_with_its_count() {
        let lines = [record("a", 0, ""), record("a", 1, ""), record("b", 0, "")];
        assert_eq!(refusal(&lines), "3: group b: 1 of 2 samples when the input ended");
        assert_eq!(refusal(&[record("a", 0, ""), record("a", 0, "")]), "2: group a: sample_index 0 stands twice");
        let three = [record("a", 0, ""), record("a", 1, ""), record("a", 2, "")];
        assert_eq!(refusal(&three), "3: group a: more than its 2 samples");
    }

    #[test]
    fn what_cannot_be_trained_on_is_refused() {
        let change = |from: &str, to: &str| refusal(&[record("a", 0, "").replace(from, to)]);
        assert_eq!(change("[-1,-0.5]", "[-1]"), "1: 2 completion_token_ids but 1 logprobs");
        assert_eq!(change("[2,3]", "[2,50]"), "1: token 50 is not in the policy's vocabulary of 50");
        assert_eq!(change("\"prompt_token_ids\":[1]", "\"prompt_token_ids\":[]"), "1: prompt_token_ids is empty");
        assert!(change(",\"reward\":null", "").starts_with("1: no field \"reward\""));
        assert!(change("null", "NaN").starts_with("1: not a JSON object"));
        assert!(change("null", "1e999").starts_with("1: field \"reward\": number out of range"));
        assert!(change("0.9", "0").contains("temperature 0"));
        let long = format!("[{}]", ["1"; 15].join(","));
        assert_eq!(
            change("\"prompt_token_ids\":[1]", &format!("\"prompt_token_ids\":{long}")),
            "1: 17 tokens; the policy has 16 positions"
        );
    }

    #[test]
    fn an_empty_completion_is_a_completion() {
        let line = record("a", 0, "").replace("[2,3]", "[]").replace("[-1,-0.5]", "[]");
        assert!(read(&[line, record("a", 1, "")]).unwrap()[0].completions[0].tokens.is_empty());
    }

    #[test]
    fn weights_other_than_those_held_are_refused_unless_stale_ones_are_allowed() {
        let groups = read(&[record("a", 0, ""), record("a", 1, "")]).unwrap();
        let held = |id: &'static str, step: u64| (id, step);
        let check = |(id, step): &(&str, u64), allowed| groups[0].completions[0].check_policy(id, *step, allowed);
        assert!(check(&held("p", 3), Staleness::Steps(0)).is_ok());
        let message = check(&held("q", 4), Staleness::Steps(0)).unwrap_err().to_string();
        assert!(message.contains("sampled by p (step 3), but the weights held are q (step 4)"), "{message}");
        assert!(check(&held("q", 4), Staleness::Steps(1)).is_ok());
        assert!(check(&held("q", 5), Staleness::Steps(1)).is_err());
        assert!(check(&held("q", 3), Staleness::Steps(1)).is_err(), "another policy of the same step is no older one");
        assert!(check(&held("q", 2), Staleness::Steps(1)).is_err());
        assert!(check(&held("q", 2), Staleness::Any).is_ok());
    }

    #[test]
    fn parts_of_rewards_are_unknown_where_a_completion_lacks_them() {
        let lines = [record("a", 0, r#","rewards":{"x":1,"y":null}"#), record("a", 1, r#","rewards":{"y":4,"x":2}"#)];
        let want = [("x".into(), vec![Some(1.0), Some(2.0)]), ("y".into(), vec![None, Some(4.0)])];
        assert_eq!(parts(&read(&lines).unwrap()), want);
    }
}
