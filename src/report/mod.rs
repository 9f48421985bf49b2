//! Writes the report of one or more runs: a single page of HTML that needs no network, no script and no other file.
//!
//! Everything that stands in records is data: the template escapes it, and the page's own policy refuses to load or run anything.

mod curve;
mod evaluations;
mod groups;
mod history;
mod meaning;
mod plot;
mod recipe;

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use minijinja::{Environment, Value, context};
use serde::Serialize;

use self::history::History;
use self::plot::number;
use self::recipe::Pinned;
use crate::checkpoint::State;
use crate::error::{Error, Result};
use crate::grpo::advantage::ScaleRewards;
use crate::grpo::health;
use crate::run::Run;
use crate::run::recipe::STEPS;
use crate::tokenizer::Tokenizer;

/// What to report.
#[derive(Debug, Clone, clap::Args)]
pub struct ReportArgs {
    /// Write a page about this run to the file of --html: metrics, evaluations, samples and recipe. Repeat it to lay runs over one another
    #[arg(long, value_name = "RUN", requires = "html", conflicts_with_all = ["files", "output", "json"])]
    pub run: Vec<PathBuf>,
    /// The page that --run makes; it appears when it is complete
    #[arg(long, value_name = "FILE", requires = "run")]
    pub html: Option<PathBuf>,
    /// With --run, a step whose samples the page shows; can be repeated [default: six, from the first to the last]
    #[arg(long, value_name = "STEP", requires = "run")]
    pub step: Vec<u64>,
    /// With --run, a directory of recipes: the page says what a run's recipe changed in the one that is most like it
    #[arg(long, value_name = "DIR", requires = "run")]
    pub recipes: Option<PathBuf>,
}

/// What is known of a run.
struct Known {
    name: String,
    run: Run,
    history: History,
    recipe: Option<Pinned>,
    evaluations: Vec<evaluations::Evaluation>,
    state: Option<State>,
}

/// A metric of all runs.
#[derive(Debug, Serialize)]
struct Chart {
    name: String,
    means: &'static str,
    bad: &'static str,
    svg: Value,
    /// By run: its place, and the values at the beginning, at the end, and the extremes.
    values: Vec<(usize, [String; 4])>,
    #[serde(skip)]
    rank: (usize, usize),
}

/// A cause that `health` named in a run.
#[derive(Debug, Serialize)]
struct Warning {
    name: String,
    count: u64,
    first: u64,
    last: u64,
    advice: &'static str,
}

/// The page about the runs.
///
/// # Errors
/// [`Error::Usage`] when a directory is no run, [`Error::Record`] and [`Error::Data`] when a file of it is damaged, [`Error::Io`].
pub fn page(args: &ReportArgs) -> Result<String> {
    let known: Vec<Known> = args.run.iter().map(|dir| Known::read(dir, args)).collect::<Result<_>>()?;
    let (charts, recipes): (Vec<Chart>, Vec<_>) = (charts(&known), known.iter().map(|one| &one.recipe).collect());
    let sections: Vec<Value> = meaning::SECTIONS
        .iter()
        .enumerate()
        .map(|(at, section)| {
            let charts: Vec<&Chart> = charts.iter().filter(|chart| chart.rank.0 == at).collect();
            context! { title => section.title, is_open => section.is_open, charts }
        })
        .collect();
    let runs: Vec<Value> = known.iter().map(|one| one.context(args)).collect::<Result<_>>()?;
    let context = context! {
        title => known.iter().map(|one| one.name.as_str()).collect::<Vec<_>>().join(", "),
        style => Value::from_safe_string(include_str!("page.css").into()),
        version => env!("CARGO_PKG_VERSION"),
        runs, sections,
        rows => recipe::rows(&recipes),
    };
    let mut jinja = Environment::new();
    jinja.set_trim_blocks(true);
    jinja.set_lstrip_blocks(true);
    jinja.add_template("page.html", include_str!("page.html")).expect("the template is part of the program");
    let page = jinja.get_template("page.html").expect("just added").render(context);
    page.map_err(|err| Error::Data(format!("the page cannot be made: {err}")))
}

impl Known {
    fn read(dir: &Path, args: &ReportArgs) -> Result<Self> {
        let run = Run::new(dir);
        let recipe = Pinned::read(&run, args.recipes.as_deref())?;
        if recipe.is_none() && !run.metrics().is_file() {
            return Err(Error::Usage(format!("no run {}: it has neither recipe.env nor metrics.jsonl", dir.display())));
        }
        let name = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
        Ok(Self {
            name: name.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            history: History::read(&run)?,
            evaluations: evaluations::read(&run)?,
            state: run.policy().ok().and_then(|policy| State::load(&policy).ok().flatten()),
            recipe,
            run,
        })
    }

    fn context(&self, args: &ReportArgs) -> Result<Value> {
        let steps: Option<u64> = self.recipe.as_ref().and_then(|recipe| recipe.get(STEPS).parse().ok());
        let ends = |name: &str| self.history.curve(name).and_then(curve::Curve::ends).map(|ends| ends.map(number));
        let recipe = self.recipe.as_ref();
        let checkpoints = self.run.trained_checkpoints()?;
        Ok(context! {
            name => self.name,
            step => self.history.step,
            steps,
            is_done => steps.is_some_and(|steps| self.history.step >= steps),
            reward => ends("reward"),
            length => ends("completions/mean_length"),
            tokens => self.history.curve("num_tokens").and_then(curve::Curve::newest).map(number),
            warnings => self.warnings(),
            evaluations => self.evaluations,
            samples => self.samples(&args.step)?,
            base => recipe.and_then(Pinned::base),
            commands => recipe.map(|recipe| recipe.commands(&self.name)),
            verify => (checkpoints.len() > 1).then(|| [checkpoints.first(), checkpoints.last()]),
            policy_id => self.state.as_ref().map(|state| state.policy_id.as_str()),
            made_by => self.state.as_ref().map(|state| state.package_version.as_str()),
        })
    }

    fn warnings(&self) -> Vec<Warning> {
        let warning = |cause: &history::Cause| Warning {
            name: cause.name.clone(),
            count: cause.count,
            first: cause.first,
            last: cause.last,
            advice: health::Cause::named(&cause.name).map_or("", health::Cause::advice),
        };
        self.history.health.iter().map(warning).collect()
    }

    /// The samples of some steps. Without a tokenizer they are plain text.
    fn samples(&self, asked: &[u64]) -> Result<Vec<groups::Step>> {
        let tokenizer = self.run.policy().ok().and_then(|policy| Tokenizer::load(&policy).ok());
        let scale = self.recipe.as_ref().map_or("", |recipe| recipe.get("SCALE_REWARDS"));
        let scale = ScaleRewards::from_str(scale, true).unwrap_or(ScaleRewards::Group);
        let steps = groups::choose(&self.run.steps_with_rollouts()?, asked);
        steps.into_iter().map(|step| groups::read(&self.run, step, scale, tokenizer.as_ref())).collect()
    }
}

/// The charts of all metrics, in the order of the page.
fn charts(runs: &[Known]) -> Vec<Chart> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in runs.iter().flat_map(|one| &one.history.curves) {
        if name != "step" && !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let chart = |name: &str| {
        let curves = runs.iter().enumerate().filter_map(|(at, one)| Some((at, one.history.curve(name)?)));
        let curves: Vec<(usize, &curve::Curve)> = curves.collect();
        let values = curves.iter().filter_map(|(run, curve)| {
            let ([first, last], [(_, low), (_, high)]) = (curve.ends()?, curve.extent()?);
            Some((*run, [first, last, low, high].map(number)))
        });
        let (rank, meaning::Meaning { section, means, bad }) = meaning::of(name);
        let svg = Value::from_safe_string(plot::draw(&curves));
        Chart { name: name.to_owned(), means, bad, svg, values: values.collect(), rank: (section, rank) }
    };
    let mut charts: Vec<Chart> = names.into_iter().map(chart).collect();
    charts.sort_by_key(|chart| chart.rank);
    charts
}
