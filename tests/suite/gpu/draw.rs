use grpo_pipes::engine::Sampler;
use grpo_pipes::gpu::decode::{DrawLog, LogEntry, SampleStart, SlotCapacity, Slots};
use grpo_pipes::gpu::kernels::{DrawOutput, DrawRows, Logits, SoftmaxSums, draw, head_rows, mark_seen};
use grpo_pipes::gpu::{Buffer, DynBuffer};
use grpo_pipes::model::{Config, Sampling};
use grpo_pipes::numbers::dtype::Dtype;
use grpo_pipes::numbers::rng::Stream;

use super::{DTYPES, gpu, numbers};
use crate::fixtures::directory;

const ROWS: usize = 3;
const LIMIT: usize = 6;

fn distributions() -> Vec<Sampling> {
    let plain = Sampling::default();
    vec![
        plain,
        Sampling { temperature: 0.7, ..plain },
        Sampling { temperature: 0.0, ..plain },
        Sampling { top_k: 5, ..plain },
        Sampling { top_p: 0.8, ..plain },
        Sampling { min_p: 0.1, temperature: 1.3, ..plain },
        Sampling { repetition_penalty: 1.7, temperature: 0.0, ..plain },
        Sampling { top_k: 40, top_p: 0.9, min_p: 0.02, repetition_penalty: 1.2, temperature: 0.9 },
    ]
}

/// Logits of one draw: some equal, so that ties are met.
fn logits(round: usize, vocabulary: usize) -> Vec<f32> {
    numbers(round as u64, ROWS * vocabulary).iter().map(|x| (x * 64.0).round() / 8.0).collect()
}

/// Every token and log-probability is the CPU sampler's, whatever the distribution.
#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn draws_are_the_cpus_on_a_gpu() {
    let mut config = Config::load(&directory().join("tiny-qwen2")).unwrap();
    let shape = SlotCapacity { slots: 4, max_prompt_tokens: 8, max_completion_tokens: LIMIT };
    for sampling in distributions() {
        let gpu = gpu();
        // A plain one from more blocks of tokens than a warp has lanes, the last of them not whole.
        config.vocab_size = if SoftmaxSums::suits(&sampling, 2500) { 35_001 } else { 2500 };
        let slots = Slots::new(&gpu, &config, shape, Dtype::F32, sampling.repetition_penalty != 1.0).unwrap();
        let log = DrawLog::new(&gpu, 4, LIMIT).unwrap();
        let ends = DrawOutput { stops: Buffer::from_slice(&gpu, &[2499u32]).unwrap(), log };
        let rows = Buffer::from_slice(&gpu, &[2u32, 0, 3]).unwrap();
        let prompt = [5u32, 7, 2400];
        let stream = Stream::new(3, 1, "p");
        if slots.words > 0 {
            let tokens = Buffer::from_slice(&gpu, &prompt).unwrap();
            mark_seen(&*gpu, &slots, 1, &tokens).unwrap();
        }
        let begin = |(sample, slot)| SampleStart { slot, prompt: 1, prompt_len: 3, key: stream.key(), sample };
        slots.begin(&*gpu, &[2, 0, 3].into_iter().enumerate().map(begin).collect::<Vec<_>>()).unwrap();
        let summed = SoftmaxSums::suits(&sampling, config.vocab_size)
            .then(|| SoftmaxSums::new(&gpu, ROWS, config.vocab_size).unwrap());
        let mut sampler = Sampler::default();
        let mut history = vec![Vec::new(); ROWS];
        for round in 0..LIMIT - 1 {
            let logits = logits(round, config.vocab_size);
            let on_gpu = Buffer::from_slice(&gpu, &logits).unwrap();
            // A plain distribution is drawn from with the sums of the whole card and without, in turn.
            let summed = summed.as_ref().filter(|_| round % 2 == 0);
            if let Some(summed) = summed {
                summed.largest.clear().unwrap();
                summed.find_largest(&*gpu, &on_gpu, [ROWS, config.vocab_size]).unwrap();
                let logits = (&on_gpu, config.vocab_size);
                summed.sum(&*gpu, &slots, &rows, logits, sampling.temperature).unwrap();
            }
            let logits_there = Logits { of: &on_gpu, vocabulary: config.vocab_size, summed };
            draw(&*gpu, &slots, DrawRows::Rows(&rows), logits_there, &sampling, &ends).unwrap();
            gpu.wait(&gpu.mark().unwrap()).unwrap();
            for (row, slot) in [2, 0, 3].into_iter().enumerate() {
                let logits = &logits[row * config.vocab_size..][..config.vocab_size];
                let uniform = stream.uniform(row as u64, round as u64);
                let (token, logprob) = sampler.draw(logits, [&prompt, &history[row]], uniform, &sampling).unwrap();
                history[row].push(token);
                let Some(LogEntry::Token(drawn, got)) = ends.log.entry(slot, round) else {
                    panic!("nothing was drawn")
                };
                assert_eq!(drawn, token, "{sampling:?}, row {row}, draw {round}");
                assert!((got - logprob).abs() < 2e-5, "{sampling:?}: {got} for {logprob}");
            }
        }
    }
}

/// An end token, the limit and logits that are not finite end a sequence; a slot that has ended draws nothing more.
#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn ends_of_sequences_on_a_gpu() {
    let gpu = gpu();
    let config = Config::load(&directory().join("tiny-qwen2")).unwrap();
    let (vocabulary, greedy) = (config.vocab_size, Sampling { temperature: 0.0, ..Sampling::default() });
    let shape = SlotCapacity { slots: 3, max_prompt_tokens: 8, max_completion_tokens: 4 };
    let slots = Slots::new(&gpu, &config, shape, Dtype::F32, false).unwrap();
    let log = DrawLog::new(&gpu, 3, 4).unwrap();
    let ends = DrawOutput { stops: Buffer::from_slice(&gpu, &[9u32, 11]).unwrap(), log };
    let begin = |slot| SampleStart { slot, prompt: 0, prompt_len: 1, key: [0, 0], sample: slot };
    slots.begin(&*gpu, &[0, 1, 2].map(begin)).unwrap();
    let rows = Buffer::from_slice(&gpu, &[0u32, 1, 2, u32::MAX]).unwrap();
    let mut table = vec![0.0; 4 * vocabulary];
    for round in 0..6 {
        table.fill(0.0);
        table[if round == 1 { 11 } else { 3 }] = 1.0; // row 0 stops at its second token
        table[vocabulary + 5] = 1.0; // row 1 goes on to the limit
        table[2 * vocabulary + 7] = if round == 2 { f32::INFINITY } else { 1.0 };
        let logits = Buffer::from_slice(&gpu, &table).unwrap();
        let logits = Logits { of: &logits, vocabulary, summed: None };
        draw(&*gpu, &slots, DrawRows::Rows(&rows), logits, &greedy, &ends).unwrap();
    }
    gpu.wait(&gpu.mark().unwrap()).unwrap();
    let drawn = |slot| -> Vec<Option<LogEntry>> { (0..4).map(|position| ends.log.entry(slot, position)).collect() };
    let tokens = |slot| -> Vec<u32> {
        let token = |entry| if let Some(LogEntry::Token(token, _)) = entry { Some(token) } else { None };
        drawn(slot).into_iter().map_while(token).collect()
    };
    assert_eq!((tokens(0), drawn(0)[2]), (vec![3, 11], None));
    assert_eq!(tokens(1), [5; 4]);
    assert_eq!((tokens(2), &drawn(2)[2..]), (vec![7, 7], &[Some(LogEntry::NotFinite), None][..]));
    ends.log.clear(1);
    assert_eq!((tokens(1).len(), tokens(0).len()), (0, 2));
}

/// The head's product finds the largest logit of each row, whatever the number of rows; one that is not finite is above all.
#[test]
#[ignore = "run by the tests of gpu/mod.rs"]
fn the_head_knows_each_rows_largest_logit_on_a_gpu() {
    let (gpu, width, depth) = (gpu(), 1090, 72);
    for rows in [1, 13, 70] {
        for dtype in DTYPES {
            let (mut x, weight) = (numbers(1, rows * depth), numbers(2, width * depth));
            x[rows / 2 * depth] = f32::INFINITY;
            let (x, weight) =
                (DynBuffer::from_f32(&gpu, dtype, &x).unwrap(), DynBuffer::from_f32(&gpu, dtype, &weight).unwrap());
            let (logits, largest) = (Buffer::new(&gpu, rows * width).unwrap(), Buffer::zeros(&gpu, rows).unwrap());
            head_rows(&*gpu, (weight.at(0), &x), &logits, Some(&largest), [rows, width, depth]).unwrap();
            let summed = SoftmaxSums::new(&gpu, rows, width).unwrap();
            summed.largest.clear().unwrap();
            summed.find_largest(&*gpu, &logits, [rows, width]).unwrap();
            assert_eq!(largest.to_vec().unwrap(), summed.largest.to_vec().unwrap(), "{rows} rows, {dtype:?}");
            for (i, row) in logits.to_vec().unwrap().chunks_exact(width).enumerate() {
                let (finite, ordered) = (row.iter().all(|x: &f32| x.is_finite()), largest.to_vec().unwrap()[i]);
                let found = f32::from_bits(if ordered >> 31 == 1 { ordered & 0x7fff_ffff } else { !ordered });
                let want = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                assert!(
                    if finite { found == want } else { found.is_nan() },
                    "row {i} of {rows}, {dtype:?}: {found} for {want}"
                );
                assert_eq!(finite, i != rows / 2);
            }
        }
    }
}
