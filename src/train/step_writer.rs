//! What remains of a run's steps: weights for the sampler, rollouts, metrics, and checkpoints.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::checkpoint::{copy_files, sync};
use crate::error::{Error, Result};
use crate::grpo::groups::Group;
use crate::lines::jsonl::write_zst;
use crate::process::stopwatch::Stopwatch;
use crate::run::{Holder, Live, PartnerWatch, Run, sampled_from};
use crate::train::resident::Job;
use crate::train::trainer::Trainer;

/// Weights up to this size are copied, with their moments, for a checkpoint that is written while training goes on [bytes]. Larger
/// ones only from a GPU: on the processor the copy would take as much memory again as training does, to save the time of a write
/// that is little against that of a step.
const COPIED_UP_TO: u64 = 64 << 20;

/// Writes what remains of a step.
pub struct Keeper<'a> {
    pub job: &'a Job,
    sampler: &'a PartnerWatch,
    pub live: Live,
    /// The earliest step whose weights were there at the start.
    oldest: u64,
    metrics: File,
    /// The policy's step.
    pub committed: u64,
    /// Rollouts of the steps since.
    written: Vec<PathBuf>,
    /// The checkpoint that is being written while training goes on, and its step.
    writing: Option<(u64, JoinHandle<Result<()>>)>,
    pub stopwatch: Stopwatch,
}

impl<'a> Keeper<'a> {
    /// Of a run whose policy is at `step`.
    pub fn new(job: &'a Job, sampler: &'a PartnerWatch, live: Live, step: u64) -> Result<Self> {
        let path = job.run.metrics();
        let metrics = OpenOptions::new().append(true).create(true).open(&path).map_err(Error::io(path))?;
        Ok(Self {
            job,
            sampler,
            live,
            oldest: job.run.oldest_weights(step)?,
            metrics,
            committed: step,
            written: Vec::new(),
            writing: None,
            stopwatch: Stopwatch::new(["training", "handing over", "keeping"]),
        })
    }

    fn ahead(&self) -> u64 {
        self.job.grpo.max_staleness.ahead()
    }

    /// Before the first step: the weights that a sampler that may be ahead begins with. It takes them from there, because their
    /// checkpoint may be left behind before it needs the last of them.
    pub fn publish_start(&mut self, trainer: &mut Trainer) -> Result<()> {
        if self.ahead() == 0 {
            return Ok(()); // it has them already
        }
        let step = trainer.state.step;
        for earlier in sampled_from(step, self.ahead(), self.oldest)..step {
            let older = self.job.run.older(step, earlier);
            self.live.publish(earlier, |dir| copy_files(&older, dir))?;
        }
        self.live.publish(step, |dir| trainer.save_for_sampling(dir, true))
    }

    /// After each step: the weights first, because somebody may be waiting for them.
    pub fn keep(&mut self, trainer: &mut Trainer, groups: &[Group], metrics: &[Vec<u8>]) -> Result<()> {
        // Who waits for these weights is known from here on, however short its work then is.
        if self.sampler.became()? == Holder::Working || self.ahead() > 0 {
            let (step, by_file) = (trainer.state.step, !self.live.is_taken());
            let publish = || self.live.publish(step, |dir| trainer.save_for_sampling(dir, by_file));
            self.stopwatch.time("handing over", publish)?;
        }
        let began = Instant::now();
        self.write(trainer, groups, metrics)?;
        self.stopwatch.add("keeping", began.elapsed());
        Ok(())
    }

    /// The rest, while the sampler goes on.
    fn write(&mut self, trainer: &mut Trainer, groups: &[Group], metrics: &[Vec<u8>]) -> Result<()> {
        let step = trainer.state.step;
        let rollouts = self.job.run.rollouts(step);
        let completions = groups.iter().flat_map(|group| &group.completions);
        write_zst(&rollouts, completions.map(|completion| completion.line.text.as_str()))?;
        self.written.push(rollouts);
        let lines: Vec<u8> = metrics.iter().flat_map(|line| [line, &b"\n"[..]].concat()).collect();
        self.metrics.write_all(&lines).map_err(Error::io(self.job.run.metrics()))?;
        if self.writing.as_ref().is_some_and(|(_, thread)| thread.is_finished()) {
            self.finish(trainer)?;
        }
        if !step.is_multiple_of(self.job.keep.every) {
            return Ok(());
        }
        let copied = trainer.machine.kind().is_some() || trainer.machine.config().weight_bytes() <= COPIED_UP_TO;
        if copied && self.ahead() == 0 { self.commit_aside(trainer) } else { self.commit(trainer) }
    }

    /// Makes all steps so far final; nothing to do when they are.
    pub fn commit(&mut self, trainer: &mut Trainer) -> Result<()> {
        self.finish(trainer)?;
        let step = trainer.state.step;
        if step == self.committed {
            return Ok(());
        }
        let older = sampled_from(step, self.ahead(), self.oldest)..step;
        trainer.older = older.map(|earlier| self.live.weights(earlier)).collect();
        self.end(step)?.make_final(|out| trainer.publish(out, false, self.job.command_line.clone()))?;
        self.is_final(step, trainer)
    }

    /// The same while training goes on, from a copy.
    fn commit_aside(&mut self, trainer: &mut Trainer) -> Result<()> {
        self.finish(trainer)?;
        let Some(snapshot) = trainer.snapshot(self.job.command_line.clone())? else { return self.commit(trainer) };
        let step = trainer.state.step;
        let end = self.end(step)?;
        self.writing = Some((step, std::thread::spawn(move || end.make_final(|out| snapshot.publish(out)))));
        Ok(())
    }

    /// Waits for the checkpoint that is being written.
    pub fn finish(&mut self, trainer: &mut Trainer) -> Result<()> {
        let Some((step, thread)) = self.writing.take() else { return Ok(()) };
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        self.is_final(step, trainer)
    }

    fn end(&mut self, step: u64) -> Result<End> {
        let metrics = self.metrics.try_clone().map_err(Error::io(self.job.run.metrics()))?;
        Ok(End { run: self.job.run.clone(), step, rollouts: std::mem::take(&mut self.written), metrics })
    }

    fn is_final(&mut self, step: u64, trainer: &mut Trainer) -> Result<()> {
        let Job { run, keep, .. } = self.job;
        self.committed = step;
        trainer.goes_on_from(&run.checkpoint(step));
        run.leave_behind(step, *keep)
    }
}

/// The end of the last step that a checkpoint makes final.
struct End {
    run: Run,
    step: u64,
    rollouts: Vec<PathBuf>,
    metrics: File,
}

impl End {
    /// Everything before the step's end is on the disk when the policy is it.
    fn make_final(&self, publish: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let Self { run, step, rollouts, metrics } = self;
        rollouts.iter().try_for_each(|path| sync(path))?;
        sync(&run.rollouts_dir())?;
        metrics.sync_all().map_err(Error::io(run.metrics()))?;
        publish(&run.checkpoint(*step))?;
        run.point_policy_at(*step)
    }
}
