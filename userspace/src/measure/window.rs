//! Which sequence numbers have come, in constant memory.

/// What an arrival is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The first of its number, and of all that have come the highest.
    InOrder,
    /// The first of its number, after a higher one.
    Reordered,
    /// Its number has come before.
    Duplicate,
    /// Too far behind the highest to be told from a duplicate.
    TooOld,
}

/// A sliding bitmap over the last numbers.
#[derive(Clone, Debug)]
pub struct Window {
    /// The highest number, and one more; 0 if there was none.
    end: u64,
    bits: Box<[u64]>,
}

impl Window {
    /// Numbers that are remembered below the highest.
    pub const SIZE: u64 = 1 << 17;

    /// Nothing has come.
    pub fn new() -> Self {
        Self { end: 0, bits: vec![0; (Self::SIZE / 64) as usize].into() }
    }

    /// Notes an arrival.
    pub fn insert(&mut self, number: u64) -> Arrival {
        let in_order = number >= self.end;
        if in_order {
            // What comes into the window has not been seen.
            for fresh in self.end.max((number + 1).saturating_sub(Self::SIZE))..number {
                self.set(fresh, false);
            }
            self.end = number + 1;
        } else if number + Self::SIZE < self.end {
            return Arrival::TooOld;
        } else if self.is_set(number) {
            return Arrival::Duplicate;
        }
        self.set(number, true);
        if in_order { Arrival::InOrder } else { Arrival::Reordered }
    }

    fn is_set(&self, number: u64) -> bool {
        let at = number % Self::SIZE;
        self.bits[(at / 64) as usize] & 1 << (at % 64) != 0
    }

    fn set(&mut self, number: u64, value: bool) {
        let at = number % Self::SIZE;
        let word = &mut self.bits[(at / 64) as usize];
        *word = *word & !(1 << (at % 64)) | u64::from(value) << (at % 64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Arrival::*;

    #[test]
    fn tells_order_and_duplicates() {
        let mut window = Window::new();
        let arrivals: Vec<Arrival> = [0, 1, 3, 2, 3, 2, 0, 4].map(|number| window.insert(number)).into();
        assert_eq!(arrivals, [InOrder, InOrder, InOrder, Reordered, Duplicate, Duplicate, Duplicate, InOrder]);
    }

    #[test]
    fn slides() {
        let mut window = Window::new();
        window.insert(0);
        window.insert(5);
        assert_eq!(window.insert(Window::SIZE + 5), InOrder);
        // 5 shares its bit with SIZE + 5, and has just left the window.
        assert_eq!(window.insert(4), TooOld);
        assert_eq!(window.insert(6), Reordered);
        assert_eq!(window.insert(6), Duplicate);
        // A jump over the whole window leaves nothing behind.
        assert_eq!(window.insert(10 * Window::SIZE), InOrder);
        assert_eq!(window.insert(10 * Window::SIZE - 1), Reordered);
        assert_eq!(window.insert(9 * Window::SIZE + 1), Reordered);
        assert_eq!(window.insert(9 * Window::SIZE - 1), TooOld);
    }

    #[test]
    fn agrees_with_a_set() {
        let mut window = Window::new();
        let mut seen = std::collections::HashSet::new();
        let mut highest = 0;
        for step in 0..200_000u64 {
            // Forwards on the whole, now and then back, now and then far ahead.
            let number = (step * 3).saturating_sub(step * 7_919 % 1_000) + step / 50_000 * 400_000;
            let arrival = window.insert(number);
            match (seen.insert(number), number + Window::SIZE < highest) {
                (_, true) => assert_eq!(arrival, TooOld, "{number}"),
                (true, false) => assert!(matches!(arrival, InOrder | Reordered), "{number}"),
                (false, false) => assert_eq!(arrival, Duplicate, "{number}"),
            }
            highest = highest.max(number + 1);
        }
    }
}
