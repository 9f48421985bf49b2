//! Everything seen from outside: each command as a process, and the library against its references.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)] // a test that panics has failed, which is what it is for

mod adapter;
mod board;
mod borrowed;
mod chaos;
mod config_fields;
mod conversation;
mod damage;
mod dataset;
mod disk;
mod docs;
mod engine;
mod evaluate;
mod export_hf;
mod families;
mod fixtures;
mod fork;
mod forms;
mod fuzz;
#[cfg(feature = "candle")]
mod gguf;
mod gpu;
mod grown;
mod grpo;
mod grpo_step;
mod gsm8k_prep;
mod health;
mod hub;
mod k8s;
mod layering;
mod lm_eval;
mod losses;
mod model;
mod model_dirs;
mod numerics;
mod phrasings;
mod pipeline;
mod plain_transformer;
mod process;
mod ranks;
mod report;
mod resident;
mod rollout;
mod rope;
mod runs;
mod sampled;
mod sampler;
mod score;
mod serve;
mod signals;
mod slow_disk;
mod slurm;
mod study;
#[cfg(feature = "candle")]
mod teachers;
mod terminal;
mod tiny_job;
mod tokenizer;
mod verify;
