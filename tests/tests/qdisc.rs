//! The queue of an interface on this machine's kernel, checked by iproute2's `tc`.

use anyhow::{Context, Result, ensure};
use nix::net::if_::if_nametoindex;
use qjump::{
    qdisc::{self, Available, Before, Error, Owner, Queue, Setup, Shape},
    units::Rate,
};
use qjump_ebpf::Level;
use qjump_tests::link::Link;
use serde_json::Value;

const P: u16 = 280;

/// Level 7: one packet of P a millisecond, nothing at once. Level 5: bytes, with a burst.
fn setup() -> Setup {
    let mut shapes = [None; 8];
    shapes[7] = Some(Shape { rate_bytes: u64::from(P) * 1_000, burst_ns: 0, least_bytes: P });
    shapes[5] = Some(Shape { rate_bytes: 6_250_000, burst_ns: 1_000_000, least_bytes: 84 });
    Setup { queue: Queue::Htb, shapes, link_rate: None, horizon_ns: 0 }
}

/// The near interface, and what works on it.
struct Near<'a> {
    link: &'a Link,
    ifindex: u32,
}

impl<'a> Near<'a> {
    fn new(link: &'a Link) -> Result<Self> {
        let ifindex = link.near.enter(|| Ok(if_nametoindex(link.device.as_str())?))?;
        Ok(Self { link, ifindex })
    }

    fn enter<T: Send, E: Into<anyhow::Error> + Send>(
        &self,
        work: impl FnOnce(u32) -> std::result::Result<T, E> + Send,
    ) -> Result<T> {
        self.link.near.enter(|| work(self.ifindex).map_err(Into::into))
    }

    fn tc(&self, words: &str) -> Result<()> {
        self.link.near.batch("tc", &words.replace("DEV", &self.link.device))
    }

    fn show(&self, flags: &[&str], what: &str) -> Result<String> {
        let mut command = self.link.near.command("tc");
        let output = command.args(flags).args([what, "show", "dev", &self.link.device]).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    fn json(&self, what: &str) -> Result<Vec<Value>> {
        Ok(serde_json::from_str(&self.show(&["-j"], what)?)?)
    }

    /// Everything that `tc` says but counters.
    fn state(&self) -> Result<String> {
        Ok(self.show(&["-d"], "qdisc")? + &self.show(&["-d"], "class")?)
    }

    fn apply(&self, setup: &Setup, before: &Before) -> Result<()> {
        self.enter(|ifindex| qdisc::apply(ifindex, setup, before))
    }
}

fn number(value: &Value, key: &str) -> Result<u64> {
    value[key].as_u64().with_context(|| format!("no {key} in {value}"))
}

#[test]
fn htb_is_what_was_asked_for() -> Result<()> {
    let link = Link::new()?;
    let near = Near::new(&link)?;
    near.apply(&setup(), &Before::Default)?;
    print!("{}", near.state()?);
    println!("{:?}", near.enter(|ifindex| qdisc::verify(ifindex, &setup()))?);
    let linked = Setup { link_rate: Some(Rate::from_bps(100_000_000)), ..setup() };
    near.apply(&linked, &Before::Default)?;
    print!("{}", near.state()?);
    println!("{:?}", near.enter(|ifindex| qdisc::verify(ifindex, &linked))?);
    near.enter(|ifindex| qdisc::restore(ifindex, &Before::Default))?;
    print!("{}", near.state()?);
    println!("{:?}", qdisc::available()?);
    Ok(())
}
