//! The limiter on several CPUs at once, in both objects: with the compare-exchange, and with the locks that old kernels need.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use qjump::dataplane::{Maps, has_compare_exchange};
use qjump_ebpf::{Config, LevelLimit, Reason, limiter::Oversize};
use qjump_tests::{
    frames::{ethernet, ipv4},
    kernel,
    program::{DROP, NEXT, Shim, SkBuff, objects, time},
};

const LEVEL: usize = 7;
const EPOCH: Duration = Duration::from_millis(1);
/// Packets that may leave at once: the level does not run dry before the CPUs have met at its word some thousand times.
const BURST: u64 = 20_000;
const CPUS: usize = 3;
const OFFERED: u64 = 40_000;

fn config() -> Result<Config> {
    let mut config = Config::EMPTY;
    let epoch_ns = EPOCH.as_nanos() as u64;
    config.limits[LEVEL] = LevelLimit::per_packet(epoch_ns, (BURST - 1) * epoch_ns, 256, Oversize::Drop)?;
    Ok(config)
}

/// Offers packets on several CPUs while `meanwhile` is repeated, and compares what passed, by the program's answers, with what
/// the limit allows in that time. Prints how many gave up.
fn race(object: &[u8], name: &str, mut meanwhile: impl FnMut(&mut Maps) -> Result<()>) -> Result<()> {
    let mut shim = Shim::of_object(object, &config()?)?;
    let (passed, dropped, running) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(true));
    let packet = ethernet(0x0800, &ipv4(0xe0, 18));
    let began = Instant::now();
    let (program, maps) = shim.parts()?;
    thread::scope(|scope| -> Result<()> {
        let offer = || -> Result<()> {
            for _ in 0..OFFERED {
                match time(program, &packet, SkBuff::priority(LEVEL as u32), 1)?.0 {
                    NEXT => passed.fetch_add(1, Relaxed),
                    DROP => dropped.fetch_add(1, Relaxed),
                    other => anyhow::bail!("the program answered {other}"),
                };
            }
            Ok(())
        };
        let senders: Vec<_> = (0..CPUS).map(|_| scope.spawn(offer)).collect();
        let waiting = scope.spawn(|| {
            let ended: Result<()> = senders.into_iter().try_for_each(|sender| sender.join().expect("no panic"));
            running.store(false, Relaxed);
            ended
        });
        while running.load(Relaxed) {
            meanwhile(maps)?;
        }
        waiting.join().expect("no panic")
    })?;
    let epochs = (began.elapsed().as_nanos() / EPOCH.as_nanos()) as u64 + 1;
    let (passed, dropped) = (passed.into_inner(), dropped.into_inner());
    ensure!(passed + dropped == CPUS as u64 * OFFERED, "{passed} and {dropped}");
    ensure!((BURST..=BURST + epochs).contains(&passed), "{name}: {passed} of {BURST} and {epochs}");
    let contended = shim.counters()?[LEVEL].reasons[Reason::Contended.index()].packets;
    println!("{name}: {passed} passed where {BURST} and at most {epochs} may, {contended} gave up");
    // Who gives up is dropped though there was room, which is to be rare.
    ensure!(contended * 100 < passed, "{name}: {contended} packets gave up");
    Ok(())
}

#[test]
fn the_kernel_is_asked_what_it_can() {
    assert_eq!(has_compare_exchange(), kernel::has_compare_exchange());
}

#[test]
fn several_cpus_together_get_the_limit_and_no_more() -> Result<()> {
    objects().into_iter().try_for_each(|(name, object)| {
        race(object, name, |_| {
            thread::sleep(Duration::from_millis(1));
            Ok(())
        })
    })
}

#[test]
fn a_plan_that_is_loaded_again_and_again_under_them_gives_them_nothing() -> Result<()> {
    objects().into_iter().try_for_each(|(name, object)| {
        let mut changes = 0;
        let config = config()?;
        race(object, name, |maps| {
            changes += 1;
            Ok(maps.put_in_force(&config)?)
        })?;
        println!("{changes} changes");
        ensure!(changes > 1, "too few changes: {changes}");
        Ok(())
    })
}
