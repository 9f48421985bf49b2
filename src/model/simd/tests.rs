//! The instruction sets against each other, and their common functions.

use std::cell::Cell;

use super::*;
use crate::model::{Config, DecodeRow, Gradients, KvCache, Model, Packed, Target};

thread_local! {
    /// Takes the place of what the processor has.
    pub static FORCED: Cell<Option<Level>> = const { Cell::new(None) };
}

/// The instruction sets of this processor.
pub fn levels() -> Vec<Level> {
    match *LEVEL {
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => vec![Level::Avx512, Level::Avx2, Level::Plain],
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => vec![Level::Avx2, Level::Plain],
        Level::Plain => vec![Level::Plain],
    }
}

/// Logits of a prefill, of a decode step of six rows, and of a prefill in bf16; then log-probabilities and all
/// gradients; on threads that are held to an instruction set.
fn computed_on(level: Level, hidden: usize) -> [Vec<f32>; 2] {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(2).start_handler(move |_| FORCED.set(Some(level)));
    threads.build().unwrap().install(|| {
        let config: Config = serde_json::from_value(serde_json::json!({
            "model_type": "qwen2", "vocab_size": 83, "hidden_size": hidden, "intermediate_size": 1100, "num_hidden_layers": 2,
            "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "initializer_range": 0.1
        }))
        .unwrap();
        let (model, tokens) = (Model::random(config, 5), [7, 11, 3, 80, 2, 7, 41]);
        let (prompt, mut logits) = model.prefill(&[], &[&tokens]).remove(0);
        let mut own: Vec<_> = (0..6).map(|_| KvCache::new(model.config(), 1)).collect();
        let row = |(token, own)| DecodeRow { token, prompt: &prompt, own };
        let mut next = vec![0.0; 6 * 83];
        model.decode(&mut (20..).zip(&mut own).map(row).collect::<Vec<_>>(), &mut next);
        logits.extend(next);

        logits.extend(model.to_bf16().prefill(&[], &[&tokens]).remove(0).1);

        let packed = Packed { tokens: tokens.to_vec(), starts: vec![0, 7], prefixes: vec![None] };
        let targets: Vec<_> = (0..6).map(|row| Target { row, token: tokens[row + 1] }).collect();
        let mut gradients = Gradients::zeros(&model);
        let stats = model.accumulate_gradients(&packed, &targets, 0.9, &mut gradients, &|i, _| (1.0 + i as f32).into());
        let learned = stats.iter().flat_map(|stats| [stats.logprob, stats.entropy]);
        [logits, learned.chain(gradients.0.iter().flat_map(|gradient| gradient.to_vec())).collect()]
    })
}

/// Every kernel of the model on every instruction set that this processor has.
#[test]
fn the_instruction_sets_agree() {
    for hidden in [30, 150] {
        let plain = computed_on(Level::Plain, hidden);
        let best = computed_on(*LEVEL, hidden);
        for (plain, best) in plain.iter().zip(&best) {
            let scale = best.iter().fold(1.0f32, |max, x| max.max(x.abs()));
            let off = plain.iter().zip(best).map(|(a, b)| (a - b).abs() / scale).fold(0.0, f32::max);
            assert!(off < 1e-5, "{off}");
        }
        #[cfg(target_arch = "x86_64")]
        if *LEVEL == Level::Avx512 {
            assert_ne!(plain, best, "plain code rounds products too, or the level was not forced");
            assert_eq!(computed_on(Level::Avx2, hidden), best);
        }
    }
}

struct ExpOf(f32);
impl Kernel for ExpOf {
    type Out = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        exp::<S>(self.0)
    }
}

#[test]
fn exp_is_within_two_units_in_the_last_place() {
    let mut worst = 0.0f64;
    for i in -870_000..880_000 {
        let x = i as f32 * 1e-4;
        let want = f64::from(x).exp();
        // SAFETY: the kernel has no pointers.
        let got = unsafe { run(ExpOf(x)) };
        worst = worst.max(((f64::from(got) - want) / want).abs());
    }
    assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst}");
    // SAFETY: as above.
    unsafe {
        assert_eq!(run(ExpOf(f32::NEG_INFINITY)), 0.0);
        assert_eq!(run(ExpOf(0.0)), 1.0);
        assert!(run(ExpOf(1e30)).is_finite());
    }
}
