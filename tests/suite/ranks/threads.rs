//! Ranks as threads of one process, which send each other bytes.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel};

use grpo_pipes::train::ranks::Ranks;

type Bytes = Vec<u8>;

/// One of several threads; it has a channel to each and from each.
pub struct Thread {
    rank: usize,
    to: Vec<Sender<Bytes>>,
    from: Vec<Mutex<Receiver<Bytes>>>,
}

impl Thread {
    /// All of them, by rank.
    pub fn all(count: usize) -> Vec<Self> {
        let mut threads: Vec<Self> = (0..count).map(|rank| Self { rank, to: Vec::new(), from: Vec::new() }).collect();
        for from in 0..count {
            for to in 0..count {
                let (sender, receiver) = channel();
                threads[from].to.push(sender);
                threads[to].from.push(Mutex::new(receiver));
            }
        }
        threads
    }

    fn receive(&self, from: usize) -> Bytes {
        self.from[from].lock().unwrap().recv().expect("the other thread is there")
    }

    fn send_numbers(&self, to: usize, numbers: &[f32]) {
        self.to[to].send(numbers.iter().flat_map(|x| x.to_le_bytes()).collect()).unwrap();
    }

    fn receive_numbers(&self, parts: &mut [f32]) {
        let part = parts.len() / self.count();
        for (from, to) in parts.chunks_mut(part).enumerate() {
            let bytes = self.receive(from);
            bytes.as_chunks().0.iter().zip(to).for_each(|(bytes, x)| *x = f32::from_le_bytes(*bytes));
        }
    }
}

impl Ranks for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.to.len()
    }

    fn tell(&self, bytes: &[u8]) {
        self.to[1..].iter().for_each(|to| to.send(bytes.to_vec()).unwrap());
    }

    fn hear(&self) -> Bytes {
        self.receive(0)
    }

    fn gather(&self, own: &[u8]) -> Vec<Bytes> {
        self.to.iter().for_each(|to| to.send(own.to_vec()).unwrap());
        (0..self.count()).map(|from| self.receive(from)).collect()
    }

    fn gather_numbers(&self, own: &[f32], all: &mut [f32]) {
        (0..self.count()).for_each(|to| self.send_numbers(to, own));
        self.receive_numbers(all);
    }

    fn exchange(&self, parts: &[f32], received: &mut [f32]) {
        parts.chunks(parts.len() / self.count()).enumerate().for_each(|(to, part)| self.send_numbers(to, part));
        self.receive_numbers(received);
    }

    fn abort(&self, code: u8) -> ! {
        panic!("rank {} ends all with code {code}", self.rank)
    }
}
