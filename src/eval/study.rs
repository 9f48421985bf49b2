//! Ranks the variants of a study by their evaluations after training, with intervals over seeds.

use std::fmt::{self, Display, Formatter};
use std::path::{Path, PathBuf};

use super::stats::Spread;
use super::summary::Summary;
use crate::error::{Error, Result};

/// Runs of a study: the variants, the best first.
#[derive(Debug)]
pub struct Study {
    /// The variant that the others are compared with.
    baseline: String,
    variants: Vec<Variant>,
    /// Problems and completions of each evaluation.
    measured: [usize; 2],
}

/// The runs of one variant.
#[derive(Debug)]
struct Variant {
    name: String,
    runs: Vec<Run>,
}

/// A run of one seed.
#[derive(Debug)]
struct Run {
    seed: String,
    sampled: Summary,
    greedy: Summary,
}

impl Study {
    /// Reads the evaluations after training of runs whose directories are named VARIANT-SEED. The first is of the baseline.
    ///
    /// # Errors
    /// [`Error::Usage`] when a directory has another name; [`Error::Io`] when a run has no evaluation; [`Error::Data`] when one is
    /// damaged, or runs were not measured alike.
    pub fn read(dirs: &[PathBuf]) -> Result<Self> {
        let (mut variants, mut measured) = (Vec::<Variant>::new(), None);
        for dir in dirs {
            let (name, run) = read_run(dir)?;
            let size = [run.sampled.num_prompts, run.sampled.num_completions];
            if *measured.get_or_insert(size) != size {
                let what = "was not evaluated on as many problems and completions as the runs before it";
                return Err(Error::Data(format!("{}: {what}", dir.display())));
            }
            match variants.iter_mut().find(|variant| variant.name == name) {
                Some(variant) => variant.runs.push(run),
                None => variants.push(Variant { name, runs: vec![run] }),
            }
        }
        let baseline = variants.first().map(|variant| variant.name.clone()).unwrap_or_default();
        variants.sort_by(|one, other| other.accuracy().mean.total_cmp(&one.accuracy().mean));
        Ok(Self { baseline, variants, measured: measured.unwrap_or_default() })
    }
}

fn read_run(dir: &Path) -> Result<(String, Run)> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let Some((variant, seed)) = name.rsplit_once('-') else {
        return Err(Error::Usage(format!(
            "{}: the directory of a run of a study is named VARIANT-SEED",
            dir.display()
        )));
    };
    let of = |kind: &str| Summary::read(&dir.join(format!("eval/after.{kind}.json")));
    Ok((variant.into(), Run { seed: seed.into(), sampled: of("sampled")?, greedy: of("greedy")? }))
}

fn strict(summary: &Summary) -> f64 {
    summary.accuracy_strict.map_or(f64::NAN, |rate| rate.value)
}

impl Variant {
    fn spread(&self, value: impl Fn(&Run) -> f64) -> Spread {
        Spread::of(&self.runs.iter().map(value).collect::<Vec<_>>())
    }

    /// What variants are ranked by: it varies less than greedy accuracy does.
    fn accuracy(&self) -> Spread {
        self.spread(|run| strict(&run.sampled))
    }

    /// How much better than the run of the same seed, which began alike.
    fn against(&self, baseline: &Self) -> Spread {
        let other = |run: &Run| baseline.runs.iter().find(|other| other.seed == run.seed);
        let pairs = self.runs.iter().filter_map(|run| Some(strict(&run.sampled) - strict(&other(run)?.sampled)));
        Spread::of(&pairs.collect::<Vec<_>>())
    }
}

impl Display for Study {
    /// A title, a header and a line per variant, aligned, without a final line end.
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let [prompts, completions] = self.measured;
        let width = self.variants.iter().map(|variant| variant.name.len()).max().unwrap_or(0).max(7);
        writeln!(
            out,
            "strict accuracy on {prompts} held-out problems, {completions} completions; 95 % intervals over seeds"
        )?;
        let against = format!("against {}", self.baseline);
        write!(
            out,
            "{:<width$}  seeds  {:>14}  {against:>18}  {:>14}  {:>14}",
            "variant", "sampled [%]", "greedy [%]", "format [%]"
        )?;
        let baseline = self.variants.iter().find(|variant| variant.name == self.baseline);
        for variant in &self.variants {
            let format = |run: &Run| run.sampled.format_rate.map_or(f64::NAN, |rate| rate.value);
            let difference = match baseline {
                Some(baseline) if baseline.name != variant.name => {
                    let spread = variant.against(baseline);
                    format!("{:+.1}{}", 100.0 * spread.mean, half_width(spread))
                }
                _ => "-".into(),
            };
            let [sampled, greedy, format] =
                [variant.accuracy(), variant.spread(|run| strict(&run.greedy)), variant.spread(format)]
                    .map(|spread| format!("{:.1}{}", 100.0 * spread.mean, half_width(spread)));
            let (name, seeds) = (&variant.name, variant.runs.len());
            write!(out, "\n{name:<width$}  {seeds:>5}  {sampled:>14}  {difference:>18}  {greedy:>14}  {format:>14}")?;
        }
        Ok(())
    }
}

fn half_width(spread: Spread) -> String {
    spread.half_width.map_or(String::new(), |half| format!(" +- {:.1}", 100.0 * half))
}
