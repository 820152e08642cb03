//! What the egress program costs: the verifier, once for each load, and every packet. A jump fails.
//!
//! `cargo xtask vm --virtual-time cost -- --nocapture` prints both for every kernel, and in virtual time to the same
//! nanosecond each time.

use anyhow::{Context, Result};
use qjump_ebpf::{Config, LevelLimit, limiter::Oversize};
use qjump_tests::{
    frames::{ethernet, ipv4},
    kernel::{at_least, has_compare_exchange, is_guest, is_virtual},
    program::{Shim, SkBuff, classifier, lab, objects, time},
};

/// Instructions that kernels of a release or later go through, at most, when they verify the program: what was measured,
/// and a fifth on top. The limit of the kernel is a million (BPF_COMPLEXITY_LIMIT_INSNS).
const VERIFIED: [((u32, u32), u32); 3] = [((5, 10), 130_000), ((6, 1), 81_000), ((6, 18), 45_000)];

/// What a packet of a limited level costs, at most, in units of what reading the clock does: more than what was ever measured,
/// on any machine.
const PASS_PER_CLOCK: f64 = 3.0;
/// What a packet of best effort costs, at most, in units of an empty program.
const BEST_EFFORT_PER_EMPTY: f64 = 3.0;

fn config() -> Result<Config> {
    let mut config = Config::EMPTY;
    // The next packet finds its epoch over.
    config.limits[7] = LevelLimit::per_packet(1, 0, 256, Oversize::Drop)?;
    Ok(config)
}

#[test]
fn the_verifier_is_done_with_the_program_soon() -> Result<()> {
    let known = VERIFIED.iter().rev().find(|((major, minor), _)| at_least(*major, *minor));
    let (_, most) = known.context("older kernels refuse the program")?;
    for (kernels, object) in objects() {
        let mut shim = Shim::of_object(object, &config()?)?;
        let info = shim.program()?.info()?;
        // The kernel tells since 5.16.
        let Some(verified) = info.verified_instruction_count() else {
            assert!(!at_least(5, 16), "this kernel counts what it verifies");
            continue;
        };
        let size = info.size_translated().context("the kernel tells what it made of it")? / 8;
        println!("the object {kernels}: verified {verified} instructions of a program of {size}");
        assert!(verified <= *most, "{verified} instructions, after {most} at most so far");
    }
    Ok(())
}

#[test]
fn a_packet_costs_a_small_multiple_of_reading_the_clock() -> Result<()> {
    const REPEAT: u32 = 20_000;
    const ROUNDS: usize = 7;
    let mut shim = Shim::load(&config()?)?;
    let (mut empty, mut clock) = (lab("qj_empty")?, lab("qj_clock")?);
    let packet = |class| ethernet(0x0800, &ipv4(class, 18));
    // The least of some rounds in turn: what else the machine does is in none of them.
    let mut least = [u64::MAX; 4];
    for _ in 0..ROUNDS {
        let skb = SkBuff::priority;
        let round = [
            time(&*classifier(&mut empty, "qj_empty")?, &packet(0), skb(0), REPEAT)?.1,
            time(&*classifier(&mut clock, "qj_clock")?, &packet(0), skb(0), REPEAT)?.1,
            time(shim.program()?, &packet(0), skb(0), REPEAT)?.1,
            time(shim.program()?, &packet(0xe0), skb(7), REPEAT)?.1,
        ];
        least.iter_mut().zip(round).for_each(|(least, ns)| *least = ns.min(*least));
    }
    let [empty, clock, best_effort, pass] = least;
    println!("ns a packet: empty {empty}, clock {clock}, best effort {best_effort}, limited {pass}");
    if is_virtual() {
        // A nanosecond is an instruction of the emulated CPU, and the clock costs next to nothing: what was measured, and a
        // third on top. Locks are dearer.
        assert!(best_effort <= 612 && (pass <= 900 || !has_compare_exchange()), "{best_effort} and {pass}");
        return Ok(());
    }
    if is_guest() {
        // What is dear on a processor is not what is dear to emulate.
        return Ok(());
    }
    let ratio = |a: u64, b: u64| a as f64 / b.max(1) as f64;
    assert!(ratio(pass, clock) <= PASS_PER_CLOCK, "{pass} and {clock}");
    assert!(ratio(best_effort, empty) <= BEST_EFFORT_PER_EMPTY, "{best_effort} and {empty}");
    Ok(())
}
