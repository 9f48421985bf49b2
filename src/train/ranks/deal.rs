//! Deals the parts of a step out to ranks.

use std::cmp::Reverse;

/// The rank of each part: the largest part first, each to the rank that has the least so far. Equal ones go by their order, so that every
/// rank deals alike.
#[must_use]
pub fn deal(costs: &[usize], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by_key(|&part| Reverse(costs[part])); // stable
    let (mut owners, mut loads) = (vec![0; costs.len()], vec![0; ranks]);
    for part in order {
        let least = (0..ranks).min_by_key(|&rank| loads[rank]).expect("at least one rank");
        owners[part] = least;
        loads[least] += costs[part];
    }
    owners
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn large_parts_are_dealt_first_and_equal_ones_in_their_order() {
        assert_eq!(deal(&[1, 8, 3, 5, 4], 2), [1, 0, 0, 1, 1]);
        assert_eq!(deal(&[2, 2, 2], 2), [0, 1, 0]);
        assert_eq!(deal(&[7], 3), [0]);
        assert_eq!(deal(&[3, 1, 2], 1), [0, 0, 0]);
        assert!(deal(&[], 4).is_empty());
    }

    proptest! {
        /// The bound of Graham 1969 for this order: 4/3 of the least possible, which is at least the mean and at least the largest part.
        #[test]
        fn no_rank_has_much_more_than_its_share(costs in prop::collection::vec(1usize..5000, 1..60), ranks in 1usize..9) {
            let owners = deal(&costs, ranks);
            let load = |rank| owners.iter().zip(&costs).filter(|(owner, _)| **owner == rank).map(|(_, cost)| cost).sum::<usize>();
            let most = (0..ranks).map(load).max().unwrap();
            let (total, largest) = (costs.iter().sum::<usize>(), *costs.iter().max().unwrap());
            prop_assert!(most <= total.div_ceil(ranks) + largest);
            prop_assert_eq!((0..ranks).map(load).sum::<usize>(), total);
        }
    }
}
