//! What is asked of a cache: which keys, how often, and how large their values are. Pure: everything follows from
//! seeds.

use std::str::FromStr;

use rand::RngExt;
use rand_xoshiro::Xoshiro256PlusPlus;

/// The most keys: their popularity is a table.
pub const MAX_KEYS: u64 = 10_000_000;
/// The largest value, bytes: with its header it fits into the 1 MiB that memcached takes by default.
pub const MAX_VALUE: usize = 1_000_000;
/// Bytes of a key; Facebook's ETC has 30.8 on average.
pub const KEY: usize = 30;

/// How often keys are asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Popularity {
    /// All the same.
    Uniform,
    /// The k-th as often as 1/k^s.
    Zipf(f64),
}

/// How large values are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// All the same, bytes.
    Fixed(usize),
    /// As in Facebook's general-purpose pool ETC (Atikoglu et al., Workload Analysis of a Large-Scale Key-Value
    /// Store, SIGMETRICS 2012, tables 4 and 5): many of a few bytes, and a tail. 194 bytes on average, cut at
    /// [`MAX_VALUE`].
    Etc,
}

/// Places at which a value may begin.
const POOL: usize = 4 << 20;

/// Shares of values of 0 to 14 bytes in ETC.
const ETC_SMALL: [f64; 15] = [
    0.00536, 0.00047, 0.17820, 0.09239, 0.00018, 0.02740, 0.00065, 0.00606, 0.00023, 0.00837, 0.00837, 0.08989,
    0.00092, 0.00326, 0.01980,
];
/// Larger ones are generalised Pareto, from 15 bytes on: scale and shape.
const ETC_LARGE: (f64, f64) = (214.476, 0.348238);

impl Sizes {
    /// The size below which a share `quantile` of the values lies, bytes; below 1.
    fn quantile(self, quantile: f64) -> usize {
        let Self::Etc = self else {
            let Self::Fixed(bytes) = self else { unreachable!("there are two") };
            return bytes;
        };
        let mut left = quantile;
        for (bytes, share) in ETC_SMALL.into_iter().enumerate() {
            if left < share {
                return bytes;
            }
            left -= share;
        }
        let (scale, shape) = ETC_LARGE;
        let above = (1.0 - quantile) / (1.0 - ETC_SMALL.iter().sum::<f64>());
        let large = scale / shape * (above.powf(-shape) - 1.0);
        (15.0 + large).min(MAX_VALUE as f64) as usize
    }
}

/// What is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Number of keys, 1 to [`MAX_KEYS`].
    pub keys: u64,
    /// The share of requests that store, 0 to 1.
    pub sets: f64,
    /// How often keys are asked for.
    pub popularity: Popularity,
    /// How large values are. A key's value has always the same size.
    pub sizes: Sizes,
    /// What is random follows from it.
    pub seed: u64,
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The number of its key.
    pub key: u64,
    /// Whether it stores.
    pub set: bool,
}

/// A workload with its tables; for all threads.
#[derive(Debug)]
pub struct Content {
    workload: Workload,
    /// For Zipf: the share of requests to keys up to each.
    cumulated: Vec<f64>,
    /// Every value is a part of it.
    pool: Vec<u8>,
}

impl Content {
    /// Makes the tables.
    pub fn new(workload: Workload) -> Self {
        use rand::{Rng, SeedableRng};
        let mut cumulated = Vec::new();
        if let Popularity::Zipf(exponent) = workload.popularity {
            let mut sum = 0.0;
            cumulated.extend((1..=workload.keys).map(|rank| {
                sum += (rank as f64).powf(-exponent);
                sum
            }));
            cumulated.iter_mut().for_each(|share| *share /= sum);
        }
        // Many times the keys of most workloads, so that their values begin at different places.
        let largest = match workload.sizes {
            Sizes::Fixed(bytes) => bytes,
            Sizes::Etc => MAX_VALUE,
        };
        let mut pool = vec![0; largest + POOL];
        Xoshiro256PlusPlus::seed_from_u64(workload.seed).fill_bytes(&mut pool);
        Self { workload, cumulated, pool }
    }

    /// The workload.
    pub const fn workload(&self) -> &Workload {
        &self.workload
    }

    /// The next request of a thread.
    pub fn request(&self, random: &mut Xoshiro256PlusPlus) -> Request {
        let set = random.random::<f64>() < self.workload.sets;
        let uniform = random.random::<f64>();
        let key = match self.workload.popularity {
            Popularity::Uniform => (uniform * self.workload.keys as f64) as u64,
            Popularity::Zipf(_) => self.cumulated.partition_point(|share| *share <= uniform) as u64,
        };
        Request { key: key.min(self.workload.keys - 1), set }
    }

    /// A key as it is sent.
    pub fn key(&self, key: u64) -> [u8; KEY] {
        let mut text = *b"qjump:000000000000000000000000";
        let mut rest = key;
        for digit in text.iter_mut().rev() {
            if rest == 0 {
                break;
            }
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        text
    }

    /// The value of a key. Hardly any other key has the same, however small it is.
    pub fn value(&self, key: u64) -> &[u8] {
        let hash = mix(key ^ self.workload.seed.rotate_left(32));
        // 53 bits, as many as fit.
        let length = self.workload.sizes.quantile((hash >> 11) as f64 / (1u64 << 53) as f64);
        let start = mix(hash) as usize % (self.pool.len() - length);
        &self.pool[start..start + length]
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): each bit depends on all.
const fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl FromStr for Popularity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "uniform" => Ok(Self::Uniform),
            None if text == "zipf" => Ok(Self::Zipf(0.99)),
            Some(("zipf", exponent)) => match exponent.parse() {
                Ok(exponent) if (0.0..=5.0).contains(&exponent) => Ok(Self::Zipf(exponent)),
                _ => Err(format!("'{exponent}' is no exponent from 0 to 5")),
            },
            _ => Err("write uniform, zipf (exponent 0.99) or zipf:EXPONENT".into()),
        }
    }
}

impl FromStr for Sizes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            _ if text == "etc" => Ok(Self::Etc),
            Ok(bytes) if bytes <= MAX_VALUE => Ok(Self::Fixed(bytes)),
            _ => Err(format!("write etc, or a number of bytes up to {MAX_VALUE}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn content(popularity: Popularity, sizes: Sizes, keys: u64) -> Content {
        Content::new(Workload { keys, sets: 0.1, popularity, sizes, seed: 3 })
    }

    #[test]
    fn zipf_asks_for_keys_as_often_as_it_says() {
        const N: usize = 200_000;
        let content = content(Popularity::Zipf(0.99), Sizes::Fixed(10), 1_000);
        let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
        let (mut counts, mut sets) = (vec![0usize; 1_000], 0);
        for _ in 0..N {
            let request = content.request(&mut random);
            counts[request.key as usize] += 1;
            sets += usize::from(request.set);
        }
        let harmonic: f64 = (1..=1_000).map(|rank| f64::from(rank).powf(-0.99)).sum();
        for rank in [1, 2, 10, 100] {
            let expected = f64::from(rank).powf(-0.99) / harmonic * N as f64;
            let found = counts[rank as usize - 1] as f64;
            // Five standard deviations.
            assert!((found - expected).abs() < 5.0 * expected.sqrt(), "rank {rank}: {found} of {expected}");
        }
        assert!((sets as f64 / N as f64 - 0.1).abs() < 0.005, "{sets}");
    }

    #[test]
    fn uniform_asks_for_all_alike() {
        let content = content(Popularity::Uniform, Sizes::Fixed(10), 10);
        let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
        let mut counts = [0i32; 10];
        (0..10_000).for_each(|_| counts[content.request(&mut random).key as usize] += 1);
        assert!(counts.iter().all(|count| (count - 1_000).abs() < 160), "{counts:?}");
    }

    #[test]
    fn etc_has_the_published_shape() {
        let content = content(Popularity::Uniform, Sizes::Etc, 200_000);
        let mut sizes: Vec<usize> = (0..200_000).map(|key| content.value(key).len()).collect();
        sizes.sort_unstable();
        let share = |bytes| sizes.partition_point(|size| *size < bytes) as f64 / sizes.len() as f64;
        assert!((share(3) - share(2) - 0.17820).abs() < 0.005);
        assert!((share(15) - 0.44155).abs() < 0.005, "{}", share(15));
        // The median of the tail: 15 + 214.476/0.348238 x (2^0.348238 - 1).
        let median = sizes[((0.44155 + 0.55845 / 2.0) * sizes.len() as f64) as usize];
        assert!((178..=188).contains(&median), "{median}");
        let mean = sizes.iter().sum::<usize>() as f64 / sizes.len() as f64;
        // 0.55845 x (15 + 214.476 / (1 - 0.348238)), and 2 for the small ones.
        assert!((188.0..=200.0).contains(&mean), "{mean}");
        assert!(*sizes.last().unwrap() <= MAX_VALUE);
    }

    #[test]
    fn each_key_has_a_value_of_its_own() {
        let content = content(Popularity::Uniform, Sizes::Fixed(16), 1_000);
        let values: std::collections::HashSet<&[u8]> = (0..1_000).map(|key| content.value(key)).collect();
        assert_eq!(values.len(), 1_000);
        let again = self::content(Popularity::Uniform, Sizes::Fixed(16), 1_000);
        assert!((0..1_000).all(|key| content.value(key) == again.value(key)));
        assert_eq!(&content.key(120), b"qjump:000000000000000000000120");
        assert_ne!(content.key(12), content.key(120));
    }

    #[test]
    fn words_are_read() {
        assert_eq!("zipf:1.2".parse(), Ok(Popularity::Zipf(1.2)));
        assert_eq!("uniform".parse(), Ok(Popularity::Uniform));
        assert!("zipf:-1".parse::<Popularity>().is_err() && "normal".parse::<Popularity>().is_err());
        assert_eq!(("etc".parse(), "100".parse()), (Ok(Sizes::Etc), Ok(Sizes::Fixed(100))));
        assert!("1000001".parse::<Sizes>().is_err() && "big".parse::<Sizes>().is_err());
    }
}
