//! Quantities with units, as people write them: `10gbit`, `256`, `4us`.

use std::{fmt, marker::PhantomData, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, de};
use thiserror::Error;

/// A quantity that could not be read.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{text}' is not {wanted}: {why}")]
pub struct UnitError {
    text: String,
    wanted: &'static str,
    why: String,
}

/// A rate in bit/s. Written as tc writes it: `10gbit`, `100mbit`, `1.5gbit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Rate(u64);

/// A time span in whole nanoseconds: `4us`, `1.5ms`, `0us`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Nanos(u64);

const RATE_UNITS: [(&str, f64); 5] = [("bit", 1.0), ("kbit", 1e3), ("mbit", 1e6), ("gbit", 1e9), ("tbit", 1e12)];
const TIME_UNITS: [(&str, f64); 4] = [("ns", 1.0), ("us", 1e3), ("ms", 1e6), ("s", 1e9)];

/// Above this, an f64 no longer holds every integer.
const EXACT: f64 = 9_007_199_254_740_992.0;

fn parse(text: &str, units: &[(&str, f64)], wanted: &'static str) -> Result<u64, UnitError> {
    let fail = |why: String| UnitError { text: text.to_owned(), wanted, why };
    let names = || units.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    // The micro sign and the Greek letter look the same.
    let digits = text.trim().to_ascii_lowercase().replace(['\u{b5}', '\u{3bc}'], "u");
    let split = digits.find(|c: char| c.is_alphabetic()).unwrap_or(digits.len());
    let (number, unit) = digits.split_at(split);
    if unit.is_empty() {
        return Err(fail(format!("it has no unit; write one of {}", names())));
    }
    let Some((_, scale)) = units.iter().find(|(name, _)| *name == unit) else {
        let hint = if unit.ends_with("bps") { " ('bps' means bytes to tc and bits to others)" } else { "" };
        return Err(fail(format!("the unit '{unit}' is none of {}{hint}", names())));
    };
    let number: f64 = number.trim().parse().map_err(|_| fail("it does not start with a number".to_owned()))?;
    let value = number * scale;
    if !value.is_finite() || value < 0.0 {
        return Err(fail("it must be a finite number, not below 0".to_owned()));
    }
    if value > EXACT {
        return Err(fail("it is too large".to_owned()));
    }
    Ok(value.round() as u64)
}

fn write_scaled(f: &mut fmt::Formatter<'_>, value: f64, units: &[(&str, f64)]) -> fmt::Result {
    let (name, scale) = units.iter().rev().find(|(_, scale)| value >= *scale).unwrap_or(&units[0]);
    let digits = format!("{:.3}", value / scale);
    write!(f, "{}{name}", digits.trim_end_matches('0').trim_end_matches('.'))
}

impl Rate {
    /// A rate of `bps` bit/s.
    pub const fn from_bps(bps: u64) -> Self {
        Self(bps)
    }

    /// The rate in bit/s.
    pub const fn bps(self) -> u64 {
        self.0
    }
}

impl Nanos {
    /// A span of `ns` nanoseconds.
    pub const fn from_ns(ns: u64) -> Self {
        Self(ns)
    }

    /// The span in nanoseconds.
    pub const fn ns(self) -> u64 {
        self.0
    }
}

impl FromStr for Rate {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        match parse(text, &RATE_UNITS, "a rate")? {
            0 => Err(UnitError { text: text.to_owned(), wanted: "a rate", why: "it must be above 0".to_owned() }),
            bps => Ok(Self(bps)),
        }
    }
}

impl FromStr for Nanos {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        parse(text, &TIME_UNITS, "a time span").map(Self)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_scaled(f, self.0 as f64, &RATE_UNITS)
    }
}

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_scaled(f, self.0 as f64, &TIME_UNITS)
    }
}

/// Reads a size in bytes, which has no unit.
///
/// # Errors
/// If it is anything but a plain number below 2^32.
pub fn bytes(text: &str) -> Result<u32, UnitError> {
    text.trim().parse().map_err(|_| UnitError {
        text: text.to_owned(),
        wanted: "a size",
        why: "write a plain number of bytes, for example 256".to_owned(),
    })
}

/// Reads a quantity from a string, and says what it should be if it is anything else.
struct Quantity<T> {
    expecting: &'static str,
    kind: PhantomData<T>,
}

impl<T: FromStr<Err = UnitError>> de::Visitor<'_> for Quantity<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expecting = "a rate with its unit, in quotes: \"10gbit\"";
        deserializer.deserialize_str(Quantity { expecting, kind: PhantomData })
    }
}

impl<'de> Deserialize<'de> for Nanos {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expecting = "a time with its unit, in quotes: \"4us\"";
        deserializer.deserialize_str(Quantity { expecting, kind: PhantomData })
    }
}

/// A fractional rate in bit/s, for people: `416.67mbit`.
pub fn show_rate(bps: f64) -> String {
    struct Show(f64);
    impl fmt::Display for Show {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write_scaled(f, self.0, &RATE_UNITS)
        }
    }
    Show(bps).to_string()
}

/// A fractional time in nanoseconds, for people: `4.915us`.
pub fn show_ns(ns: f64) -> String {
    struct Show(f64);
    impl fmt::Display for Show {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write_scaled(f, self.0, &TIME_UNITS)
        }
    }
    Show(ns).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_people_write() {
        assert_eq!("10gbit".parse(), Ok(Rate(10_000_000_000)));
        assert_eq!("1.5Gbit".parse(), Ok(Rate(1_500_000_000)));
        assert_eq!("100 mbit".parse(), Ok(Rate(100_000_000)));
        assert_eq!("4us".parse(), Ok(Nanos(4_000)));
        assert_eq!("4\u{b5}s".parse(), Ok(Nanos(4_000)));
        assert_eq!("4 \u{3bc}s".parse(), Ok(Nanos(4_000)));
        assert_eq!("0us".parse(), Ok(Nanos(0)));
        assert_eq!("2.5ms".parse(), Ok(Nanos(2_500_000)));
    }

    #[test]
    fn refuses_with_the_reason() {
        for (text, part) in [
            ("10", "no unit"),
            ("10gbps", "bytes to tc"),
            ("0mbit", "above 0"),
            ("nanmbit", "none of"),
            ("-1mbit", "below 0"),
            ("1e400gbit", "none of"),
            ("99999999999tbit", "too large"),
            ("mbit", "start with a number"),
            ("", "no unit"),
        ] {
            let error = text.parse::<Rate>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_size_has_no_unit() {
        assert_eq!(bytes("256"), Ok(256));
        for text in ["256B", "1.5", "-1", "", "99999999999"] {
            let error = bytes(text).unwrap_err().to_string();
            assert!(error.contains("plain number of bytes"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn whole_units_survive_a_round_trip(number in 1u64..1000, unit in 0usize..4) {
            let rate = Rate(number * RATE_UNITS[unit + 1].1 as u64);
            prop_assert_eq!(rate.to_string().parse::<Rate>(), Ok(rate));
            let time = Nanos(number * TIME_UNITS[unit].1 as u64);
            prop_assert_eq!(time.to_string().parse::<Nanos>(), Ok(time));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,20}") {
            let _ = text.parse::<Rate>();
            let _ = text.parse::<Nanos>();
        }
    }
}
