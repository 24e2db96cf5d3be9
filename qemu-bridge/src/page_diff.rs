//! Which words of a page differ from those of an older copy.

use std::arch::x86_64::{
    __m256i, __m512i, _mm256_castsi256_pd, _mm256_cmpeq_epi64, _mm256_loadu_si256,
    _mm256_movemask_pd, _mm512_cmpneq_epi64_mask, _mm512_loadu_si512,
};

use ft_core::image::{ChangedWords, Page};

/// Bytes that one number of [`ChangedWords`] stands for.
const STRETCH_BYTES: usize = 64 * 8;

/// The words of `new` that are not those of `old`, 64 bytes at a time where the processor can.
pub fn changed_words(old: &Page, new: &Page) -> ChangedWords {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has AVX-512F.
        unsafe { with_avx512(old, new) }
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        unsafe { with_avx2(old, new) }
    } else {
        portable(old, new)
    }
}

fn portable(old: &Page, new: &Page) -> ChangedWords {
    stretches(old, new, |old, new| {
        let words = old.as_chunks::<8>().0.iter().zip(new.as_chunks::<8>().0);
        words
            .rev()
            .fold(0, |bits, (old, new)| bits << 1 | u64::from(old != new))
    })
}

#[target_feature(enable = "avx512f")]
fn with_avx512(old: &Page, new: &Page) -> ChangedWords {
    stretches(old, new, |old, new| {
        let parts = old.as_chunks::<64>().0.iter().zip(new.as_chunks::<64>().0);
        parts.rev().fold(0, |bits, (old, new)| {
            // SAFETY: both are 64 bytes, and the load needs no alignment.
            let (old, new): (__m512i, __m512i) = unsafe {
                (
                    _mm512_loadu_si512(old.as_ptr().cast()),
                    _mm512_loadu_si512(new.as_ptr().cast()),
                )
            };
            bits << 8 | u64::from(_mm512_cmpneq_epi64_mask(old, new))
        })
    })
}

#[target_feature(enable = "avx2")]
fn with_avx2(old: &Page, new: &Page) -> ChangedWords {
    stretches(old, new, |old, new| {
        let parts = old.as_chunks::<32>().0.iter().zip(new.as_chunks::<32>().0);
        parts.rev().fold(0, |bits, (old, new)| {
            // SAFETY: both are 32 bytes, and the load needs no alignment.
            let (old, new): (__m256i, __m256i) = unsafe {
                (
                    _mm256_loadu_si256(old.as_ptr().cast()),
                    _mm256_loadu_si256(new.as_ptr().cast()),
                )
            };
            let equal = _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(old, new)));
            bits << 4 | u64::from(!equal as u8 & 0xf)
        })
    })
}

/// One number for each 64 words.
#[inline(always)]
fn stretches(
    old: &Page,
    new: &Page,
    compare: impl Fn(&[u8; STRETCH_BYTES], &[u8; STRETCH_BYTES]) -> u64,
) -> ChangedWords {
    let (old, new) = (old.as_chunks().0, new.as_chunks().0);
    std::array::from_fn(|at| compare(&old[at], &new[at]))
}

#[cfg(test)]
mod tests {
    use ft_core::types::PAGE_BYTES;

    use super::*;

    #[test]
    fn all_ways_see_the_same_words() {
        let old: Page = std::array::from_fn(|at| (at * 7) as u8);
        assert_eq!(changed_words(&old, &old), [0; 8]);
        let mut new = old;
        let mut seed = 1u64;
        for _ in 0..300 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            new[(seed >> 33) as usize % PAGE_BYTES] ^= 1 << (seed >> 60 & 7);
            let mut expected = ChangedWords::default();
            for (at, (old, new)) in old.chunks(8).zip(new.chunks(8)).enumerate() {
                expected[at / 64] |= u64::from(old != new) << (at % 64);
            }
            assert_eq!(portable(&old, &new), expected);
            assert_eq!(changed_words(&old, &new), expected);
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has AVX2.
                assert_eq!(unsafe { with_avx2(&old, &new) }, expected);
            }
        }
    }
}
