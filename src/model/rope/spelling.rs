//! Reads the rope entries of a `config.json` in the spelling of transformers 4, of transformers 5, or both.

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

/// The default base of the frequencies, `default_theta` of transformers.
pub(super) const DEFAULT_THETA: f64 = 10_000.0;

/// The rope entries of `config.json`.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct Spelling {
    #[serde(default, deserialize_with = "some")]
    rope_theta: Option<f64>,
    /// The spelling of transformers 4, beside `rope_theta`.
    rope_scaling: Option<Map<String, Value>>,
    /// The spelling of transformers 5, with `rope_theta` in it.
    rope_parameters: Option<Map<String, Value>>,
    #[serde(default, deserialize_with = "some")]
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

/// Reads an entry that may be missing, but not null.
fn some<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<Option<T>, D::Error> {
    T::deserialize(from).map(Some)
}

impl Spelling {
    /// Merges both spellings into one set of entries, with `rope_type` and `rope_theta`, as transformers 5 does. It is an error if
    /// versions 4 and 5 would read different numbers.
    ///
    /// # Errors
    /// Names the entries that contradict each other, or a rotation of less than whole heads.
    pub fn entries(&self, max_position_embeddings: usize) -> Result<Map<String, Value>, String> {
        let named = |entries: &Option<Map<_, _>>| entries.clone().filter(|entries| !entries.is_empty());
        let mut entries = match (named(&self.rope_scaling), named(&self.rope_parameters)) {
            (Some(old), Some(new)) => {
                let (old, new) = (self.complete(old)?, self.complete(new)?);
                if !same(&old, &new) {
                    return Err(
                        "rope_scaling and rope_parameters differ; leave one of them, with rope_theta in it".into()
                    );
                }
                old
            }
            (one, other) => self.complete(one.or(other).unwrap_or_default())?,
        };
        entries.entry("rope_theta").or_insert(DEFAULT_THETA.into());
        let within = entries.shift_remove("partial_rotary_factor").map(|factor| factor.as_f64());
        if let Some(factor) =
            [self.partial_rotary_factor.map(Some), within].into_iter().flatten().find(|f| *f != Some(1.0))
        {
            let factor = factor.map_or("no number".into(), |factor| factor.to_string());
            return Err(format!(
                "partial_rotary_factor = {factor} is not supported: heads are rotated whole, by a factor of 1"
            ));
        }
        if ["yarn", "llama3"].iter().any(|kind| entries["rope_type"] == *kind) {
            self.place_original(&mut entries, max_position_embeddings)?;
        }
        Ok(entries)
    }

    /// Renames `type` to `rope_type` and adds `rope_theta`. Nulls count as missing, except for two of YaRN's.
    fn complete(&self, mut entries: Map<String, Value>) -> Result<Map<String, Value>, String> {
        entries.retain(|name, value| !value.is_null() || ["factor", "truncate"].contains(&name.as_str()));
        let kind = match (entries.shift_remove("type"), entries.get("rope_type").cloned()) {
            (Some(old), Some(new)) if old != new => {
                return Err(format!("type {old} and rope_type {new} of rope_scaling differ; leave one of them"));
            }
            (old, new) => new.or(old).unwrap_or_else(|| "default".into()),
        };
        entries.insert("rope_type".into(), kind);
        match (self.rope_theta, entries.get("rope_theta").map(Value::as_f64)) {
            (Some(outer), Some(inner)) if inner != Some(outer) => {
                let inner = &entries["rope_theta"];
                Err(format!(
                    "rope_theta = {outer} and rope_theta = {inner} in rope_parameters differ; leave one of them"
                ))
            }
            (Some(outer), None) => {
                entries.insert("rope_theta".into(), outer.into());
                Ok(entries)
            }
            _ => Ok(entries),
        }
    }

    fn place_original(&self, entries: &mut Map<String, Value>, max_position_embeddings: usize) -> Result<(), String> {
        const NAME: &str = "original_max_position_embeddings";
        match (self.original_max_position_embeddings, entries.get(NAME)) {
            (Some(outer), Some(inner)) if inner.as_f64() != Some(outer) => {
                return Err(format!(
                    "{NAME} = {outer} and {NAME} = {inner} in rope_parameters differ; leave one of them"
                ));
            }
            (Some(outer), None) => _ = entries.insert(NAME.into(), outer.into()),
            (None, None) => _ = entries.insert(NAME.into(), max_position_embeddings.into()),
            _ => {}
        }
        Ok(())
    }
}

/// Equal entries in any order, and 4 is 4.0.
fn same(one: &Map<String, Value>, other: &Map<String, Value>) -> bool {
    let equal = |a: &Value, b: &Value| a == b || a.as_f64().is_some_and(|a| Some(a) == b.as_f64());
    one.len() == other.len() && one.iter().all(|(name, a)| other.get(name).is_some_and(|b| equal(a, b)))
}
