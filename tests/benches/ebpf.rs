//! `cargo xtask bench`: what the program costs a packet, and what it costs a flood.

fn main() -> anyhow::Result<()> {
    ns()
}
use limiter::Oversize;
use qjump_ebpf::*;
use qjump_tests::program::*;
fn ns() -> anyhow::Result<()> {
    let mut packet = vec![0u8; 64];
    packet[12] = 8;
    packet[14] = 0x45;
    packet[17] = 50;
    packet[22] = 64;
    packet[23] = 17;
    let mut config = Config::EMPTY;
    config.limits[7] = LevelLimit::per_packet(1, 0, 256, Oversize::Drop).unwrap();
    config.limits[6] = LevelLimit::per_packet(1 << 37, 0, 256, Oversize::Drop).unwrap();
    let mut shim = Shim::load(&config)?;
    let mut empty = lab("qj_empty")?;
    let mut clock = lab("qj_clock")?;
    for _ in 0..5 {
        let mut m = vec![];
        for (name, prio) in [("empty", 0), ("clock", 0), ("be", 0), ("pass", 7), ("drop", 6)] {
            let mut p = packet.clone();
            p[15] = prio << 5;
            let mut all: Vec<u64> = vec![];
            for _ in 0..20 {
                let prog = match name {
                    "empty" => &*classifier(&mut empty, "qj_empty")?,
                    "clock" => &*classifier(&mut clock, "qj_clock")?,
                    _ => shim.program()?,
                };
                all.push(time(prog, &p, SkBuff::priority(prio as u32), 200_000)?.1);
            }
            all.sort();
            m.push(format!("{name} {} {}", all[0], all[10]));
        }
        println!("{}", m.join(" | "));
    }
    println!("{:?}", shim.counted()?);
    Ok(())
}
