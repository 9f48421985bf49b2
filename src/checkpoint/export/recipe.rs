//! The numbers of the run that a checkpoint or rollouts belong to, as a card tells them.

use std::fmt::Arguments;
use std::path::Path;

/// Names and values of a run's recipe; none where there is no run.
#[derive(Debug, Default)]
pub(super) struct Recipe(Vec<(String, String)>);

/// Values that are not published: a command of the user's may hold a key.
const SECRET: [&str; 1] = ["SCORER"];

impl Recipe {
    /// The recipe in a run's directory.
    pub(super) fn beside(run: Option<&Path>) -> Self {
        let text = run.and_then(|run| std::fs::read_to_string(run.join("recipe.env")).ok()).unwrap_or_default();
        let parts = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='));
        Self(parts.map(|(name, value)| (name.into(), value.trim().into())).collect())
    }

    /// The Hub id of the model that the run began from.
    pub(super) fn base_model(&self) -> Option<&str> {
        self.hub_id("MODEL")
    }

    /// The Hub id of the data set that the run was trained on.
    pub(super) fn data_set(&self) -> Option<&str> {
        self.hub_id("DATA")
    }

    /// The value under a name.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(one, _)| one == name).map(|(_, value)| value.as_str())
    }

    fn hub_id(&self, name: &str) -> Option<&str> {
        let id = self.get(name)?;
        let is_id = id.split('/').count() == 2 && !id.starts_with(['/', '.']) && !Path::new(id).exists();
        is_id.then_some(id)
    }

    /// Passes the lines of a table to `line`. Paths of this machine lose their folders.
    pub(super) fn table(&self, line: &mut impl FnMut(Arguments<'_>)) {
        let shown = self.0.iter().filter(|(name, value)| !value.is_empty() && !SECRET.contains(&name.as_str()));
        for (row, (name, value)) in shown.enumerate() {
            if row == 0 {
                line(format_args!("\n## Recipe\n\n| | |\n|---|---|"));
            }
            let is_path = value.contains('/') && self.hub_id(name).is_none();
            let end = if is_path { value.rsplit('/').next() } else { None };
            line(format_args!("| {name} | {} |", end.unwrap_or(value)));
        }
    }
}
