//! Writes the results of a run's steps: weights for the sampler, rollouts, metrics, and checkpoints.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rayon::Yield;

use crate::checkpoint::{copy_files, sync};
use crate::error::{Error, Result};
use crate::grpo::groups::Group;
use crate::lines::jsonl::write_zst;
use crate::process::stopwatch::Stopwatch;
use crate::run::{LiveWeights, PeerState, PeerWatch, Run, sampled_from};
use crate::train::config::ResidentJob;
use crate::train::events::EventFile;
use crate::train::trainer::Trainer;

/// Writes the results of each step.
pub struct StepWriter<'a> {
    pub job: &'a ResidentJob,
    sampler: &'a PeerWatch,
    pub live: LiveWeights,
    /// The earliest step whose weights existed when training began.
    oldest: u64,
    metrics: File,
    events: EventFile,
    /// The last final step: the run's policy.
    pub final_step: u64,
    /// Rollouts of the steps since then.
    written: Vec<PathBuf>,
    /// The step whose checkpoint a thread is writing.
    writing: Option<(u64, JoinHandle<Result<()>>)>,
    pub stopwatch: Stopwatch,
}

impl<'a> StepWriter<'a> {
    /// Continues a run whose policy is at `step`.
    pub fn new(job: &'a ResidentJob, sampler: &'a PeerWatch, live: LiveWeights, step: u64) -> Result<Self> {
        let path = job.run.metrics();
        let metrics = OpenOptions::new().append(true).create(true).open(&path).map_err(Error::io(path))?;
        Ok(Self {
            job,
            sampler,
            live,
            oldest: job.run.oldest_weights(step)?,
            metrics,
            events: EventFile::open(&job.run)?,
            final_step: step,
            written: Vec::new(),
            writing: None,
            stopwatch: Stopwatch::new(["training", "handing over", "keeping"]),
        })
    }

    /// Publishes the weights that a sampler that may be ahead starts with, before the first step. It reads them there because their
    /// checkpoint may be removed before it needs the last of them.
    pub fn publish_start(&mut self, trainer: &mut Trainer) -> Result<()> {
        if self.job.steps_ahead() == 0 {
            return Ok(()); // the sampler reads the checkpoint
        }
        let step = trainer.policy_step();
        for earlier in sampled_from(step, self.job.steps_ahead(), self.oldest)..step {
            let older = self.job.run.older(step, earlier);
            self.live.publish(earlier, |dir| copy_files(&older, dir))?;
        }
        self.live.publish(step, |dir| trainer.save_for_sampling(dir, true))
    }

    /// Writes the results of a step: the weights first, because the sampler may be waiting for them.
    pub fn write_step(&mut self, trainer: &mut Trainer, groups: &[Group], metrics: &[Vec<u8>]) -> Result<()> {
        // This look at the sampler also records that there is one, even if it ends before the next look.
        if self.sampler.peer_state()? == PeerState::Working || self.job.steps_ahead() > 0 {
            let (step, by_file) = (trainer.policy_step(), !self.live.is_taken());
            let publish = || self.live.publish(step, |dir| trainer.save_for_sampling(dir, by_file));
            self.stopwatch.time("handing over", publish)?;
        }
        let began = Instant::now();
        self.write_rest(trainer, groups, metrics)?;
        self.stopwatch.add("keeping", began.elapsed());
        Ok(())
    }

    /// Writes rollouts, metrics and a due checkpoint, while the sampler works.
    fn write_rest(&mut self, trainer: &mut Trainer, groups: &[Group], metrics: &[Vec<u8>]) -> Result<()> {
        let step = trainer.policy_step();
        let rollouts = self.job.run.rollouts(step);
        let completions = groups.iter().flat_map(|group| &group.completions);
        write_zst(&rollouts, completions.map(|completion| completion.line.text.as_str()))?;
        self.written.push(rollouts);
        let lines: Vec<u8> = metrics.iter().flat_map(|line| [line, &b"\n"[..]].concat()).collect();
        self.metrics.write_all(&lines).map_err(Error::io(self.job.run.metrics()))?;
        metrics.iter().try_for_each(|line| self.events.add(line))?;
        if self.writing.as_ref().is_some_and(|(_, thread)| thread.is_finished()) {
            self.finish(trainer)?;
        }
        if !step.is_multiple_of(self.job.retention.every) {
            return Ok(());
        }
        if trainer.writes_aside() && self.job.steps_ahead() == 0 {
            self.commit_aside(trainer)
        } else {
            self.commit(trainer)
        }
    }

    /// Makes all steps so far final.
    pub fn commit(&mut self, trainer: &mut Trainer) -> Result<()> {
        self.finish(trainer)?;
        let step = trainer.policy_step();
        if step == self.final_step {
            return Ok(());
        }
        let older = sampled_from(step, self.job.steps_ahead(), self.oldest)..step;
        let older: Vec<PathBuf> = older.map(|earlier| self.live.weights(earlier)).collect();
        self.pending(step)?.make_final(|out| trainer.publish(out, &older, self.job.command_line.clone()))?;
        self.is_final(step, trainer)
    }

    /// Makes all steps so far final on a thread, from a copy, while training goes on.
    fn commit_aside(&mut self, trainer: &mut Trainer) -> Result<()> {
        self.finish(trainer)?;
        let Some(snapshot) = trainer.snapshot(self.job.command_line.clone())? else { return self.commit(trainer) };
        let step = trainer.policy_step();
        let pending = self.pending(step)?;
        self.writing = Some((step, std::thread::spawn(move || pending.make_final(|out| snapshot.publish(out)))));
        Ok(())
    }

    /// Waits until the checkpoint under way is written.
    pub fn finish(&mut self, trainer: &mut Trainer) -> Result<()> {
        let Some((step, thread)) = self.writing.take() else { return Ok(()) };
        // It computes hashes on the pool, whose only thread may be this one.
        while !thread.is_finished() {
            if rayon::yield_now() != Some(Yield::Executed) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        self.is_final(step, trainer)
    }

    fn pending(&mut self, step: u64) -> Result<PendingSteps> {
        let metrics = self.metrics.try_clone().map_err(Error::io(self.job.run.metrics()))?;
        Ok(PendingSteps { run: self.job.run.clone(), step, rollouts: std::mem::take(&mut self.written), metrics })
    }

    fn is_final(&mut self, step: u64, trainer: &mut Trainer) -> Result<()> {
        let ResidentJob { run, retention, .. } = self.job;
        self.final_step = step;
        trainer.set_source(&run.checkpoint(step));
        run.remove_unkept(step, *retention)
    }
}

/// Steps that are written, but not final yet.
struct PendingSteps {
    run: Run,
    step: u64,
    rollouts: Vec<PathBuf>,
    metrics: File,
}

impl PendingSteps {
    /// Brings everything to the disk, and only then makes the last step the policy.
    fn make_final(&self, publish: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let Self { run, step, rollouts, metrics } = self;
        rollouts.iter().try_for_each(|path| sync(path))?;
        sync(&run.rollouts_dir())?;
        metrics.sync_all().map_err(Error::io(run.metrics()))?;
        publish(&run.checkpoint(*step))?;
        run.point_policy_at(*step)
    }
}
