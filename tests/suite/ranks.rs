//! Several ranks that train together: as threads, for what they compute, and as processes of `mpirun`, for how they start and end.

mod mpirun;
mod threads;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use grpo_pipes::checkpoint;
use grpo_pipes::error::Result;
use grpo_pipes::grpo::groups::Group;
use grpo_pipes::model::{AdapterConfig, Model, TARGETS};
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::numbers::tensors::TensorFile;
use grpo_pipes::process::cancel::Stop;
use grpo_pipes::train::backend::{Backend, Cpu};
use grpo_pipes::train::config::SupervisedConfig;
use grpo_pipes::train::dynamic::DynamicSampling;
use grpo_pipes::train::grpo_step::GrpoTrainer;
use grpo_pipes::train::once::Objective;
use grpo_pipes::train::ranks::{FollowJob, One, Ranks, dismiss, follow};
use grpo_pipes::train::supervised::{self, Example};
use grpo_pipes::train::trainer::Trainer;
use serde_json::Value;
use tempfile::TempDir;

use crate::fixtures::{Reference, distance};
use crate::grpo::{Numbers, WHOLE, groups, old_groups, parsed, tiny};
use threads::Thread;

/// Losses besides those of the reference.
const MORE: [&str; 4] = [
    "--loss bnpo",
    "--loss dr_grpo --max-completion-tokens 16 --mask-truncated",
    "--loss dapo --optimizer-state bf16",
    "--loss grpo --scale-rewards batch --weight-decay 0.1",
];

/// Groups per step with --dynamic-sampling.
const DYNAMIC_GROUPS: usize = 2;

/// How a model is trained, besides by its options.
#[derive(Clone, Copy)]
struct Way {
    dtype: Dtype,
    adapter: bool,
    micro_batch_tokens: usize,
}

const PLAIN: Way = Way { dtype: Dtype::F32, adapter: false, micro_batch_tokens: WHOLE };

impl Way {
    fn open(self, model: Model, ranks: &Arc<dyn Ranks>) -> Result<Box<dyn Backend>> {
        let targets = TARGETS.to_vec();
        let config = AdapterConfig { rank: 2, alpha: 4.0, is_rank_stabilized: false, targets };
        let model = if self.adapter && model.adapter().is_none() { model.with_adapter(config, 1) } else { model };
        Ok(Box::new(Cpu::new(model, self.dtype).among(Arc::clone(ranks))))
    }
}

/// What training ended with.
struct Trained {
    dir: TempDir,
    lines: Vec<Value>,
}

impl Trained {
    fn out(&self) -> PathBuf {
        self.dir.path().join("out")
    }

    fn bytes(&self) -> Vec<Vec<u8>> {
        let read = |entry: std::io::Result<fs::DirEntry>| fs::read(entry.unwrap().path()).unwrap();
        fs::read_dir(self.out()).unwrap().map(read).collect()
    }

    /// All numbers of the weights, and of the moments.
    fn numbers(&self) -> [Vec<f32>; 2] {
        let weights = fs::read_dir(self.out()).unwrap().map(|entry| entry.unwrap().path());
        let is_weights = |path: &PathBuf| path.to_string_lossy().ends_with("model.safetensors");
        let weights = weights.into_iter().find(is_weights).unwrap();
        [weights, self.out().join(checkpoint::OPTIMIZER)].map(|path| {
            let file = TensorFile::open(&path).unwrap();
            file.names().iter().flat_map(|name| file.read::<f32>(name).unwrap().to_vec()).collect()
        })
    }
}

/// Trains the policy in `from` on `steps`, as so many threads; the checkpoint after them.
fn train(count: usize, from: &Path, options: &str, way: Way, steps: &[&[Group]]) -> Trained {
    let numbers = Numbers::of(&format!("--max-staleness any --learning-rate 1e-4 {options}"));
    let dir = tempfile::tempdir().unwrap();
    let job = FollowJob {
        init: false,
        objective: Objective::Grpo { config: Box::new(numbers.grpo.clone()), dry_run: false },
        optimizer: numbers.optimizer.clone(),
        micro_batch_tokens: Some(way.micro_batch_tokens),
        seed: None,
        stop: Stop::default(),
    };
    let lead = |ranks: &Arc<dyn Ranks>| {
        let mut lines = Vec::new();
        let mut trainer =
            Trainer::open(from, numbers.optimizer.clone(), None, &|model| way.open(model, ranks)).unwrap();
        let dynamic = numbers.grpo.dynamic_sampling;
        let dynamic = dynamic.map(|budget| DynamicSampling::new(&numbers.grpo.advantage, DYNAMIC_GROUPS, budget));
        let grpo = GrpoTrainer::new(&mut trainer, numbers.grpo.clone(), way.micro_batch_tokens, false).unwrap();
        let mut grpo = grpo.choosing_groups(dynamic);
        steps.iter().for_each(|groups| grpo.step(groups, &mut |line| lines.push(parsed(line))).unwrap());
        trainer.publish(&dir.path().join("out"), &[], Vec::new()).unwrap();
        lines
    };
    let lines = as_ranks(count, lead, |ranks| follow(&job, &**ranks, &|model| way.open(model, ranks)).unwrap());
    Trained { dir, lines }
}

/// Runs `lead` as the first rank, which then dismisses the others, and `others` as each of them.
fn as_ranks<T>(count: usize, lead: impl FnOnce(&Arc<dyn Ranks>) -> T, others: impl Fn(&Arc<dyn Ranks>) + Sync) -> T {
    if count == 1 {
        let one: Arc<dyn Ranks> = Arc::new(One);
        return lead(&one);
    }
    std::thread::scope(|scope| {
        let mut threads = Thread::all(count).into_iter().map(|thread| Arc::new(thread) as Arc<dyn Ranks>);
        let first = threads.next().unwrap();
        let others = &others;
        threads.for_each(|ranks| {
            scope.spawn(move || others(&ranks));
        });
        let led = lead(&first);
        dismiss(&*first);
        led
    })
}

fn steps_of(reference: &Reference) -> Vec<Group> {
    old_groups(reference, "1.0")
}

/// How far weights and moments may be off after one update, as the norm of the difference over the norm.
const AFTER_ONE: [f64; 2] = [1e-6, 1e-6];

/// And after several: Adam brings every gradient to one size, also one that is rounding alone, as of what all keys share and no softmax
/// sees. The next gradients are those of weights that differ by it.
const AFTER_MORE: [f64; 2] = [1e-6, 1e-5];

fn assert_close(name: &str, got: &Trained, want: &Trained, bounds: [f64; 2]) {
    for (((got, want), what), bound) in got.numbers().iter().zip(want.numbers()).zip(["weights", "moments"]).zip(bounds)
    {
        let off = distance(got, &want);
        assert!(off <= bound, "{name}: {what} are {off:e} off");
    }
}

/// The first step is equal to the last digit, because the log-probabilities of a token depend on no other.
fn assert_equal(name: &str, got: &Trained, want: &Trained, bounds: [f64; 2]) {
    assert_close(name, got, want, bounds);
    assert_eq!(got.lines.len(), want.lines.len());
    assert_eq!(got.lines[0]["loss"], want.lines[0]["loss"], "{name}");
    assert_eq!(got.lines[0]["entropy"], want.lines[0]["entropy"], "{name}");
    for (got, want) in got.lines.iter().zip(&want.lines) {
        let (got, want) = (got["grad_norm"].as_f64().unwrap(), want["grad_norm"].as_f64().unwrap());
        assert!((got - want).abs() <= 1e-5_f64.max(bounds[1]) * want, "{name}: a norm of {got} for {want}");
    }
}

#[test]
fn two_and_four_ranks_train_as_one_with_every_loss_and_to_the_same_bytes_each_time() {
    let (reference, losses) = (Reference::load(), Reference::of_losses());
    let groups = steps_of(&reference);
    let known = losses.json["losses"].as_object().unwrap().keys().map(String::as_str);
    for options in known.chain(MORE) {
        let with_reference =
            if options.contains("--beta") { format!("--reference {}", tiny().display()) } else { String::new() };
        for (updates, bounds) in [(1, AFTER_ONE), (2, AFTER_MORE)] {
            let options = format!("{options} --num-iterations {updates} {with_reference}");
            let train = |count| train(count, &tiny(), &options, PLAIN, &[&groups]);
            let one = train(1);
            for count in [2, 4] {
                let (many, name) = (train(count), format!("{count} ranks, {options}"));
                if options.contains("bf16") {
                    assert_rounded_by_the_same_chance(&many, &one);
                } else {
                    assert_equal(&name, &many, &one, bounds);
                }
                assert!(many.bytes() == train(count).bytes(), "{name}");
            }
        }
    }
}

/// Moments in bf16 are rounded by random numbers, each of which belongs to a place among all of them: hardly any is rounded otherwise.
fn assert_rounded_by_the_same_chance(got: &Trained, want: &Trained) {
    let ([_, got], [_, want]) = (got.numbers(), want.numbers());
    let different = got.iter().zip(&want).filter(|(got, want)| got != want).count();
    assert!(different * 100 < got.len(), "{different} of {}", got.len());
}

#[test]
fn adapters_and_products_in_bf16_are_trained_as_by_one() {
    let groups = steps_of(&Reference::load());
    let small = Way { micro_batch_tokens: 60, ..PLAIN };
    let ways = [
        ("adapter", Way { adapter: true, ..PLAIN }, AFTER_MORE),
        ("bf16", Way { dtype: Dtype::Bf16, ..PLAIN }, [1e-5, 3e-3]),
        ("micro-batches", small, AFTER_MORE),
    ];
    for (name, way, bound) in ways {
        let train = |count| train(count, &tiny(), "", way, &[&groups, &groups]);
        let one = train(1);
        for count in [2, 3] {
            assert_equal(&format!("{count} ranks, {name}"), &train(count), &one, bound);
        }
    }
}

#[test]
fn a_reference_that_changes_and_groups_that_are_chosen_are_those_of_one() {
    let groups = steps_of(&Reference::load());
    let model = tiny().display().to_string();
    let reference = format!(
        "--beta 0.2 --reference {model} --reference-sync-steps 2 --teacher {model} --distill 0.1 --num-iterations 3"
    );
    let trained = |of: &Trained| of.lines[0]["dynamic_sampling/groups_trained"].as_u64();
    assert!(groups.len() > DYNAMIC_GROUPS);
    for (options, chosen) in [(&reference[..], None), ("--dynamic-sampling 2", Some(DYNAMIC_GROUPS as u64))] {
        let train = |count| train(count, &tiny(), options, PLAIN, &[&groups, &groups]);
        let one = train(1);
        assert_eq!(trained(&one), chosen, "{options}");
        for count in [2, 4] {
            let (many, name) = (train(count), format!("{count} ranks, {options}"));
            assert_equal(&name, &many, &one, AFTER_MORE);
            assert_eq!(trained(&many), chosen, "{name}");
        }
    }
}

#[test]
fn more_ranks_than_groups_train_too() {
    let groups = &steps_of(&Reference::load())[..2];
    let train = |count| train(count, &tiny(), "", PLAIN, &[groups]);
    assert_equal("3 ranks", &train(3), &train(1), AFTER_ONE);
}

#[test]
fn a_checkpoint_goes_on_with_any_number_of_ranks() {
    let groups = steps_of(&Reference::load());
    let whole = train(1, &tiny(), "", PLAIN, &[&groups, &groups]);
    for [first, then] in [[2, 3], [4, 1], [1, 2]] {
        let begun = train(first, &tiny(), "", PLAIN, &[&groups]);
        let ended = train(then, &begun.out(), "", PLAIN, &[&groups]);
        assert_close(&format!("{first} ranks, then {then}"), &ended, &whole, AFTER_MORE);
    }
}

#[test]
fn supervised_steps_are_those_of_one() {
    let example = |(prompt, completion)| Example { prompt, completion, digest: [1; 32] };
    let examples: Vec<Example> = Reference::load().sequences().into_iter().map(example).collect();
    let optimizer = Numbers::of("--learning-rate 1e-4").optimizer;
    let config = SupervisedConfig { loss_on_prompt: true, micro_batch_tokens: 50 };
    let template = Default::default();
    let job = FollowJob {
        init: false,
        objective: Objective::Supervised { loss_on_prompt: true, template },
        optimizer: optimizer.clone(),
        micro_batch_tokens: Some(50),
        seed: None,
        stop: Stop::default(),
    };
    let train = |count| {
        let dir = tempfile::tempdir().unwrap();
        let lead = |ranks: &Arc<dyn Ranks>| {
            let open = |model| PLAIN.open(model, ranks);
            let mut trainer = Trainer::open(&tiny(), optimizer.clone(), None, &open).unwrap();
            let mut step = || parsed(&supervised::step(&mut trainer, config, &examples).unwrap());
            let lines = vec![step(), step()];
            trainer.publish(&dir.path().join("out"), &[], Vec::new()).unwrap();
            lines
        };
        let lines = as_ranks(count, lead, |ranks| follow(&job, &**ranks, &|model| PLAIN.open(model, ranks)).unwrap());
        Trained { dir, lines }
    };
    let one = train(1);
    for count in [2, 4] {
        assert_equal(&format!("{count} ranks"), &train(count), &one, AFTER_MORE);
    }
}

/// A request to stop that only one of the ranks gets.
#[test]
fn a_stop_of_one_rank_ends_the_step_on_all_and_the_moments_are_still_there() {
    let groups = steps_of(&Reference::load());
    let numbers = Numbers::of("--max-staleness any --learning-rate 1e-4");
    let stop = Stop::default();
    let job = FollowJob {
        init: false,
        objective: Objective::Grpo { config: Box::new(numbers.grpo.clone()), dry_run: false },
        optimizer: numbers.optimizer.clone(),
        micro_batch_tokens: None,
        seed: None,
        stop: stop.clone(),
    };
    let dir = tempfile::tempdir().unwrap();
    let lead = |ranks: &Arc<dyn Ranks>| {
        let open = |model| PLAIN.open(model, ranks);
        let mut trainer = Trainer::open(&tiny(), numbers.optimizer.clone(), None, &open).unwrap();
        let mut grpo = GrpoTrainer::new(&mut trainer, numbers.grpo.clone(), 4096, false).unwrap();
        grpo.step(&groups, &mut |_| ()).unwrap();
        stop.abandon();
        let stopped = grpo.step(&groups, &mut |_| ()).unwrap_err();
        assert_eq!(stopped.exit_code(), 5, "{stopped}");
        trainer.publish(&dir.path().join("out"), &[], Vec::new()).unwrap();
        Vec::new()
    };
    let lines = as_ranks(3, lead, |ranks| follow(&job, &**ranks, &|model| PLAIN.open(model, ranks)).unwrap());
    let trained = Trained { dir, lines };
    let want = train(1, &tiny(), "", PLAIN, &[&groups]);
    assert_close("one update", &trained, &want, AFTER_ONE);
}

/// What one rank cannot do is said by the first, with the rank's number.
#[test]
fn what_a_rank_cannot_open_ends_all_with_its_message() {
    let job = FollowJob {
        init: false,
        objective: Objective::Grpo { config: Box::new(Numbers::of("").grpo), dry_run: false },
        optimizer: Numbers::of("").optimizer,
        micro_batch_tokens: None,
        seed: None,
        stop: Stop::default(),
    };
    let fail = |_| Err(grpo_pipes::error::Error::Device("no memory here".into()));
    let lead = |ranks: &Arc<dyn Ranks>| {
        let open = |model| PLAIN.open(model, ranks);
        let failed = Trainer::open(&tiny(), Numbers::of("").optimizer, None, &open).err().unwrap();
        assert_eq!((failed.exit_code(), failed.to_string().as_str()), (1, "rank 1: no memory here"));
    };
    as_ranks(3, lead, |ranks| follow(&job, &**ranks, &fail).unwrap());
}

/// Groups come to the other ranks by their lines.
#[test]
fn a_group_that_is_read_again_is_the_same() {
    let records = crate::grpo_step::SCORED.clone();
    let read = groups(&records);
    let limits = Model::load(&tiny()).unwrap().config().into();
    for group in read {
        let lines: Vec<_> = group.completions.iter().map(|one| one.line.clone()).collect();
        let again = Group::of(group.id.clone(), &lines, limits).unwrap();
        assert_eq!(format!("{again:?}"), format!("{group:?}"));
    }
}
