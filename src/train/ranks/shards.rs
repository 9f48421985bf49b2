//! The numbers of all parameters in a row, cut into one shard per rank, and what travels between the shards.

use std::ops::{DerefMut, Range};

use super::Ranks;

/// Numbers that travel at once, those of all ranks together: it bounds the memory that this takes (16 MiB twice).
const AT_ONCE: usize = 1 << 22;

/// The numbers of all parameters in a row, cut into one contiguous shard per rank. All shards have one length, but the last ones may end
/// early.
#[derive(Debug, Clone)]
pub struct Shards {
    /// Of each parameter: where its numbers are in the row.
    places: Vec<Range<usize>>,
    total: usize,
    count: usize,
    at_once: usize,
}

impl Shards {
    /// Cuts parameters, given by name and shape, for `count` ranks.
    #[must_use]
    pub fn new(parameters: &[(String, Vec<usize>)], count: usize) -> Self {
        let mut total = 0;
        let place = |(_, shape): &(String, Vec<usize>)| {
            let start = total;
            total += shape.iter().product::<usize>();
            start..total
        };
        let places = parameters.iter().map(place).collect();
        Self { places, total, count, at_once: (AT_ONCE / count).max(1) }
    }

    /// Numbers of a shard; fewer for the last ones.
    fn size(&self) -> usize {
        self.total.div_ceil(self.count)
    }

    /// The numbers of each parameter that are in the shard of `rank`; none of some.
    #[must_use]
    pub fn of(&self, rank: usize) -> Vec<Range<usize>> {
        let start = self.size() * rank;
        self.pieces(start..start + self.size())
    }

    /// The numbers of each parameter that are in a range of the row.
    fn pieces(&self, row: Range<usize>) -> Vec<Range<usize>> {
        let within = |place: &Range<usize>| {
            let inside = |at: usize| at.clamp(place.start, place.end) - place.start;
            inside(row.start)..inside(row.end)
        };
        self.places.iter().map(within).collect()
    }

    /// The chunks that a shard travels in: for each, where it is in the row, by rank.
    fn chunks(&self) -> impl Iterator<Item = Vec<Range<usize>>> {
        let (size, end) = (self.size(), self.total);
        (0..size.div_ceil(self.at_once)).map(move |chunk| {
            let within = (chunk * self.at_once)..((chunk + 1) * self.at_once).min(size);
            let of_rank = |rank: usize| (rank * size + within.start).min(end)..(rank * size + within.end).min(end);
            (0..self.count).map(of_rank).collect()
        })
    }

    /// Adds up the gradients of all ranks for this rank's shard, in the order of the ranks, so that the sums are the same bits each time.
    /// Those of the other shards become zero, which makes a second call add nothing.
    pub fn sum<T: DerefMut<Target = [f32]>>(&self, ranks: &dyn Ranks, gradients: &mut [T]) {
        let part = self.at_once.min(self.size());
        let (mut parts, mut received) = (vec![0.0; part * self.count], vec![0.0; part * self.count]);
        for chunk in self.chunks() {
            for (to, row) in parts.chunks_mut(part).zip(&chunk) {
                self.read(gradients, row, to);
            }
            ranks.exchange(&parts, &mut received);
            let (sum, others) = received.split_at_mut(part);
            for other in others.chunks(part) {
                sum.iter_mut().zip(other).for_each(|(sum, x)| *sum += x);
            }
            self.write(gradients, &chunk[ranks.rank()], sum);
        }
        for (gradient, held) in gradients.iter_mut().zip(self.of(ranks.rank())) {
            gradient[..held.start].fill(0.0);
            gradient[held.end..].fill(0.0);
        }
    }

    /// Brings each rank's shard of these parameters to all ranks.
    pub fn spread<T: DerefMut<Target = [f32]>>(&self, ranks: &dyn Ranks, parameters: &mut [T]) {
        let part = self.at_once.min(self.size());
        let (mut own, mut all) = (vec![0.0; part], vec![0.0; part * self.count]);
        for chunk in self.chunks() {
            self.read(parameters, &chunk[ranks.rank()], &mut own);
            ranks.gather_numbers(&own, &mut all);
            for (from, row) in all.chunks(part).zip(&chunk) {
                self.write(parameters, row, from);
            }
        }
    }

    /// All numbers in their row on the first rank, and none on the others, of which each gives those of its shard.
    #[must_use]
    pub fn collect(&self, ranks: &dyn Ranks, shard: &mut dyn Iterator<Item = f32>) -> Vec<f32> {
        let part = self.at_once.min(self.size());
        let mut row = vec![0.0; if ranks.rank() == 0 { self.total } else { 0 }];
        let (mut own, mut all) = (vec![0.0; part], vec![0.0; part * self.count]);
        for chunk in self.chunks() {
            let wanted = chunk[ranks.rank()].len();
            own[..wanted].iter_mut().for_each(|own| *own = shard.next().expect("as many as the shard has"));
            ranks.gather_numbers(&own, &mut all);
            if ranks.rank() == 0 {
                all.chunks(part).zip(chunk).for_each(|(from, at)| row[at.clone()].copy_from_slice(&from[..at.len()]));
            }
        }
        row
    }

    fn read<T: DerefMut<Target = [f32]>>(&self, parameters: &[T], row: &Range<usize>, mut to: &mut [f32]) {
        for (parameter, piece) in parameters.iter().zip(self.pieces(row.clone())) {
            let (here, rest) = to.split_at_mut(piece.len());
            here.copy_from_slice(&parameter[piece]);
            to = rest;
        }
    }

    fn write<T: DerefMut<Target = [f32]>>(&self, parameters: &mut [T], row: &Range<usize>, mut from: &[f32]) {
        for (parameter, piece) in parameters.iter_mut().zip(self.pieces(row.clone())) {
            let (here, rest) = from.split_at(piece.len());
            parameter[piece].copy_from_slice(here);
            from = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier, Mutex};

    use proptest::prelude::*;

    use super::*;

    fn parameters(sizes: &[usize]) -> Vec<(String, Vec<usize>)> {
        sizes.iter().map(|size| (String::new(), vec![*size])).collect()
    }

    #[test]
    fn a_shard_is_a_piece_of_the_row_of_all_parameters() {
        let shards = Shards::new(&parameters(&[3, 2, 6]), 4);
        assert_eq!(shards.of(0), [0..3, 0..0, 0..0]);
        assert_eq!(shards.of(1), [3..3, 0..2, 0..1]);
        assert_eq!(shards.of(2), [3..3, 2..2, 1..4]);
        assert_eq!(shards.of(3), [3..3, 2..2, 4..6]);
        assert_eq!(Shards::new(&parameters(&[3, 2]), 1).of(0), [0..3, 0..2]);
        assert_eq!(Shards::new(&parameters(&[1, 1]), 3).of(2), [1..1, 1..1], "more ranks than numbers");
    }

    /// One of several threads, which see what each has sent.
    struct Thread {
        rank: usize,
        sent: Arc<Mutex<Vec<Vec<f32>>>>,
        meet: Arc<Barrier>,
    }

    impl Thread {
        fn all(count: usize) -> Vec<Self> {
            let (sent, meet) = (Arc::new(Mutex::new(vec![Vec::new(); count])), Arc::new(Barrier::new(count)));
            (0..count).map(|rank| Self { rank, sent: Arc::clone(&sent), meet: Arc::clone(&meet) }).collect()
        }

        fn see(&self, own: &[f32]) -> Vec<Vec<f32>> {
            self.sent.lock().unwrap()[self.rank] = own.to_vec();
            self.meet.wait();
            let all = self.sent.lock().unwrap().clone();
            self.meet.wait();
            all
        }
    }

    impl Ranks for Thread {
        fn rank(&self) -> usize {
            self.rank
        }
        fn count(&self) -> usize {
            self.sent.lock().unwrap().len()
        }
        fn tell(&self, _: &[u8]) {
            unreachable!()
        }
        fn hear(&self) -> Vec<u8> {
            unreachable!()
        }
        fn gather(&self, _: &[u8]) -> Vec<Vec<u8>> {
            unreachable!()
        }
        fn gather_numbers(&self, own: &[f32], all: &mut [f32]) {
            all.copy_from_slice(&self.see(own).concat());
        }
        fn exchange(&self, parts: &[f32], received: &mut [f32]) {
            let part = parts.len() / self.count();
            let own = self.see(parts).into_iter().map(|sent| sent[self.rank * part..][..part].to_vec());
            received.copy_from_slice(&own.collect::<Vec<_>>().concat());
        }
        fn abort(&self, _: u8) -> ! {
            unreachable!()
        }
    }

    /// Runs `work` as each of `count` ranks, and returns what each made of it, by rank.
    fn as_ranks<T: Send>(count: usize, work: impl Fn(&dyn Ranks) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> = Thread::all(count).into_iter().map(|rank| scope.spawn(move || work(&rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// Numbers whose sum depends on its order.
    fn gradient(rank: usize, i: usize) -> f32 {
        [1e8, 1.0, -1e8, 0.1][rank % 4] + i as f32
    }

    #[test]
    fn gradients_are_added_in_the_order_of_ranks_and_weights_come_back_whole() {
        let sizes = [5, 1, 9, 2];
        for count in [1, 2, 3, 4, 20] {
            let shards = Shards { at_once: 2, ..Shards::new(&parameters(&sizes), count) };
            let rows = as_ranks(count, |ranks| {
                let mut numbers: Vec<Vec<f32>> = Vec::new();
                for size in sizes {
                    let start = numbers.concat().len();
                    numbers.push((start..start + size).map(|i| gradient(ranks.rank(), i)).collect());
                }
                shards.sum(ranks, &mut numbers);
                shards.sum(ranks, &mut numbers); // adds zeros
                let held: Vec<f32> =
                    numbers.iter().zip(shards.of(ranks.rank())).flat_map(|(one, held)| one[held].to_vec()).collect();
                let collected = shards.collect(ranks, &mut held.into_iter());
                shards.spread(ranks, &mut numbers);
                (numbers.concat(), collected)
            });
            let of_all = |i| (0..count).map(|rank| gradient(rank, i)).reduce(|sum, x| sum + x).unwrap();
            let want: Vec<f32> = (0..sizes.iter().sum()).map(of_all).collect();
            assert!(rows.iter().all(|(spread, _)| *spread == want), "{count} ranks: {rows:?} for {want:?}");
            assert!(rows[0].1 == want && rows[1..].iter().all(|(_, collected)| collected.is_empty()));
        }
    }

    proptest! {
        #[test]
        fn every_number_is_in_one_chunk_of_one_shard(
            sizes in prop::collection::vec(1usize..40, 1..6), count in 1usize..6, at_once in 1usize..9,
        ) {
            let shards = Shards { at_once, ..Shards::new(&parameters(&sizes), count) };
            let mut times: Vec<Vec<usize>> = sizes.iter().map(|size| vec![0; *size]).collect();
            for rank in 0..count {
                let held = shards.of(rank);
                let in_chunks: usize = shards.chunks().map(|chunk| chunk[rank].len()).sum();
                prop_assert_eq!(in_chunks, held.iter().map(Range::len).sum::<usize>());
            }
            for row in shards.chunks().flatten() {
                prop_assert!(row.len() <= at_once);
                shards.pieces(row).into_iter().zip(&mut times).for_each(|(piece, times)| times[piece].iter_mut().for_each(|n| *n += 1));
            }
            prop_assert!(times.concat().iter().all(|times| *times == 1));
        }
    }
}
