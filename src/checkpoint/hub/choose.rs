//! Which files of a repository make a model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use super::Choice;
use crate::checkpoint;
use crate::directory::{self, ADAPTER, ADAPTER_WEIGHTS, CONFIG, INDEX, WEIGHTS};
use crate::error::Error;
use crate::model::Config;

/// Chooses the files of one model in a repository: small files first, then the shards that the index names. Refuses a repository that
/// holds another kind of model, not of one of the types `others`, as soon as the names or the first files show it.
pub(super) fn model_files(names: &[String], dir: &Path, others: &[&str]) -> Choice {
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    if has(ADAPTER) && !dir.join(ADAPTER).exists() {
        return Ok(vec![ADAPTER.into()]); // it names its base model
    }
    if has(ADAPTER) && has(ADAPTER_WEIGHTS) {
        let own = ["tokenizer.json"].into_iter().chain(OPTIONAL).filter(|name| has(name));
        return Ok([ADAPTER, ADAPTER_WEIGHTS].into_iter().chain(own).map(Into::into).collect()); // the base has the rest
    }
    if let Some(kind) = directory::unsupported(names, &dir.join(ADAPTER)) {
        return Err(kind);
    }
    if has(CONFIG) && !dir.join(CONFIG).exists() {
        return Ok(vec![CONFIG.into()]); // another architecture may lack other files too
    }
    if has(CONFIG) && !others.contains(&directory::model_type(dir).as_str()) {
        Config::read(&dir.join(CONFIG)).map_err(|err| match err {
            Error::Model { what, .. } => format!("{CONFIG}: {what}"),
            other => other.to_string(),
        })?;
    }
    let mut chosen = Vec::new();
    for required in [CONFIG, "tokenizer.json"] {
        if !has(required) {
            return Err(format!("has no {required}"));
        }
        chosen.push(required.to_owned());
    }
    chosen.extend(OPTIONAL.into_iter().filter(|name| has(name)).map(Into::into));
    if has(WEIGHTS) {
        chosen.push(WEIGHTS.into());
    } else if has(INDEX) {
        chosen.push(INDEX.into());
        chosen.extend(shards(&dir.join(INDEX))?);
    } else {
        return Err(format!("has no {WEIGHTS}"));
    }
    Ok(chosen)
}

/// Files of a model that it may lack.
const OPTIONAL: [&str; 5] = [
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    checkpoint::SYSTEM_PROMPT,
];

/// The shards that an index names; none before the index is downloaded.
fn shards(index: &Path) -> std::result::Result<BTreeSet<String>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Ok(text) = std::fs::read_to_string(index) else {
        return Ok(BTreeSet::new());
    };
    let index: Index = serde_json::from_str(&text).map_err(|err| format!("{INDEX}: {err}"))?;
    Ok(index.weight_map.into_values().collect())
}
