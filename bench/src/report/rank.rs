//! Whether two lists of figures differ by more than chance: the Mann-Whitney rank test.

/// The outcome of a test.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RankTest {
    /// In how many of all pairs (one figure of each list) the second one is the larger; a tie counts half.
    /// 0.5: no difference.
    pub second_larger: f64,
    /// How often chance alone would order the figures at least so unevenly: two-sided, exact, ties
    /// and all.
    pub p: f64,
}

/// Compares two lists. `None` if one of them is empty.
pub fn mann_whitney(first: &[f64], second: &[f64]) -> Option<RankTest> {
    if first.is_empty() || second.is_empty() {
        return None;
    }
    let ranks = doubled_ranks(first, second);
    let (n, m) = (first.len(), second.len());
    let sum: usize = ranks[n..].iter().sum();
    let least = m * (m + 1);
    let second_larger = (sum - least) as f64 / (2 * n * m) as f64;
    let middle = m * (n + m + 1);
    let distance = sum.abs_diff(middle);
    let ways = ways_to_sum(&ranks, m);
    let all: f64 = ways.iter().sum();
    let uneven = ways.iter().enumerate();
    let uneven = uneven.filter(|(sum, _)| sum.abs_diff(middle) >= distance);
    let p = uneven.map(|(_, ways)| ways).sum::<f64>() / all;
    Some(RankTest { second_larger, p })
}

/// Twice the rank of each figure among all, from 2 on; equal ones share the mean of their ranks.
fn doubled_ranks(first: &[f64], second: &[f64]) -> Vec<usize> {
    let all: Vec<f64> = first.iter().chain(second).copied().collect();
    let rank = |value: &f64| {
        let below = all.iter().filter(|it| it.total_cmp(value).is_lt()).count();
        let equal = all.iter().filter(|it| it.total_cmp(value).is_eq()).count();
        2 * below + equal + 1
    };
    all.iter().map(rank).collect()
}

/// In how many ways `count` of the ranks have each sum.
fn ways_to_sum(ranks: &[usize], count: usize) -> Vec<f64> {
    let most: usize = ranks.iter().sum();
    let mut ways = vec![vec![0.0; most + 1]; count + 1];
    ways[0][0] = 1.0;
    for rank in ranks {
        for taken in (0..count).rev() {
            for sum in (0..=most - rank).rev() {
                let more = ways[taken][sum];
                ways[taken + 1][sum + rank] += more;
            }
        }
    }
    ways.swap_remove(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_below_three_is_the_rarest_of_twenty_orders_both_ways() {
        let test = mann_whitney(&[1.0, 2.0, 3.0], &[4.0, 5.0, 6.0]).unwrap();
        assert_eq!(test.second_larger, 1.0);
        assert!((test.p - 2.0 / 20.0).abs() < 1e-12);
    }

    #[test]
    fn equal_lists_don_t_differ() {
        let test = mann_whitney(&[7.0; 6], &[7.0; 5]).unwrap();
        assert_eq!((test.second_larger, test.p), (0.5, 1.0));
        assert_eq!(mann_whitney(&[], &[1.0]), None);
    }

    #[test]
    fn a_textbook_case_agrees() {
        // U = 3 of 25 pairs: a two-sided p of 0.0556 in the tables for 5 and 5.
        let test = mann_whitney(&[1.0, 2.0, 3.0, 5.0, 7.0], &[4.0, 6.0, 8.0, 9.0, 10.0]).unwrap();
        assert_eq!(test.second_larger, 22.0 / 25.0);
        assert!((test.p - 14.0 / 252.0).abs() < 1e-9, "{}", test.p);
    }
}
