//! Runs the engine to its end on any decoder.

use grpo_pipes::Result;
use grpo_pipes::engine::{Completion, Decoder, Engine, Request, Settings, Sink, Work};
use grpo_pipes::process::read_ahead::ReadAhead;

struct Groups(Vec<Vec<Completion>>);

impl Sink<()> for Groups {
    fn group(&mut self, _: Request<()>, completions: Vec<Completion>) -> Result<()> {
        self.0.push(completions);
        Ok(())
    }

    fn progress(&mut self, _: Work) -> Result<()> {
        Ok(())
    }
}

/// The completions of each prompt; prompts are named p/0, p/1, ...
pub fn completions(
    decoder: &mut dyn Decoder,
    settings: Settings,
    prompts: impl Iterator<Item = Vec<u32>>,
) -> Result<Vec<Vec<Completion>>> {
    let request = |(i, tokens)| Request { prompt_id: format!("p/{i}"), tokens, payload: () };
    let requests = ReadAhead::ready(prompts.enumerate().map(request).collect());
    let mut sink = Groups(Vec::new());
    Engine::new(decoder, settings).run(requests, &mut sink)?;
    Ok(sink.0)
}
