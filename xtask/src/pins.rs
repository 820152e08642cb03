//! Every version and every package name that the tasks rely on, in one place.

use crate::apt::Package;
use crate::tools::Tool;

/// The linker that turns LLVM bitcode into an eBPF object. 0.11 and later need an LLVM development package;
/// this one loads the LLVM library that the compiler brings along.
pub const BPF_LINKER: Tool = Tool { package: "bpf-linker", version: "0.10.4", example: None, takes: "90 seconds" };

/// Timely dataflow, whose example `barrier` is a program of the experiments.
pub const TIMELY: Tool = Tool { package: "timely", version: "0.32.0", example: Some("barrier"), takes: "45 seconds" };

/// The LLVM release series that [`BPF_LINKER`] is made for. It calls that library by its C interface and reads
/// bitcode that the compiler wrote, so the compiler has to be of the same series.
pub const LLVM_MAJOR: u32 = 22;

/// A nightly known to work: its LLVM is of the series [`LLVM_MAJOR`].
pub const NIGHTLY: &str = "nightly-2026-05-20";

/// The rustup toolchains to look for, in this order. Plain `nightly` comes first because people have it; it
/// drops out by itself on the day it moves on to another LLVM.
pub const NIGHTLIES: &[&str] = &["nightly", NIGHTLY];

/// Debian's compiler: `rustc-web` follows the compiler that Firefox needs, even in a stable release.
pub const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// The Debian packages with [`DEBIAN_RUSTC`] and with `core` built for the BPF targets.
pub const DEBIAN_COMPILER: &[Package] = &[
    Package { provides: DEBIAN_RUSTC, name: "rustc-web" },
    Package { provides: DEBIAN_BPF_CORE, name: "libstd-rust-web-dev-bpf" },
];

/// Where `libstd-rust-web-dev-bpf` puts `core`.
const DEBIAN_BPF_CORE: &str = if cfg!(target_endian = "big") {
    "/usr/lib/rustlib/bpfeb-unknown-none"
} else {
    "/usr/lib/rustlib/bpfel-unknown-none"
};

/// What the testbed, and so the demo, the tests and the benchmarks, run besides qjump: namespaces, links and
/// queueing disciplines are set up with iproute2, iperf3 makes the traffic in the background, and ping asks beside it.
pub const TESTBED: &[Package] = &[
    Package { provides: "ip", name: "iproute2" },
    Package { provides: "tc", name: "iproute2" },
    Package { provides: "iperf3", name: "iperf3" },
    Package { provides: "ping", name: "iputils-ping" },
];

/// What the tests run besides that: programs in C and Python, to see that they get their levels, rules of nftables, the
/// programs of the experiments, a browser, to see that a report is what it should be, and Prometheus, for whom the metrics are.
pub const TESTS: &[Package] = &[
    Package { provides: "nft", name: "nftables" },
    Package { provides: "gcc", name: "gcc" },
    Package { provides: "/usr/include/stdio.h", name: "libc6-dev" },
    Package { provides: "/usr/bin/python3", name: "python3" },
    Package { provides: "chromium", name: "chromium" },
    // Without a font a browser draws no letters.
    Package { provides: "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf", name: "fonts-dejavu-core" },
    Package { provides: "ptpd", name: "ptpd" },
    Package { provides: "memcached", name: "memcached" },
    // Terminals, checks of units, and readers of what packages have.
    Package { provides: "tmux", name: "tmux" },
    Package { provides: "script", name: "bsdutils" },
    Package { provides: "setpriv", name: "util-linux" },
    Package { provides: "systemd-analyze", name: "systemd" },
    Package { provides: "man", name: "man-db" },
    Package { provides: "/usr/lib/python3/dist-packages/jsonschema", name: "python3-jsonschema" },
    Package { provides: "/usr/lib/python3/dist-packages/yaml", name: "python3-yaml" },
];

/// What packages are made with.
pub const PACKAGING: &[Package] = &[
    Package { provides: "dpkg-deb", name: "dpkg" },
    Package { provides: "gzip", name: "gzip" },
    Package { provides: "tar", name: "tar" },
    Package { provides: "strip", name: "binutils" },
    Package { provides: "promtool", name: "prometheus" },
];

/// What the benchmarks run besides [`TESTBED`]: the tools that `qjump measure` is compared with.
pub const BENCHES: &[Package] =
    &[Package { provides: "sockperf", name: "sockperf" }, Package { provides: "irtt", name: "irtt" }];

/// What guests are made with besides that: the keys of Debian's archive, and what unpacks modules and strips programs.
pub const GUESTS: &[Package] = &[
    Package { provides: DEBIAN_KEYS, name: "debian-archive-keyring" },
    Package { provides: "xz", name: "xz-utils" },
    Package { provides: "strip", name: "binutils" },
];

/// What Debian's packages are signed with.
pub const DEBIAN_KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The BPF instruction set of the objects: v3 has 32-bit registers (Linux 5.1) and the atomic compare-exchange of the limiter
/// (Linux 5.12), which the object for old kernels does without.
pub const BPF_CPU: &str = "v3";

/// The Rust target of the eBPF programs. It has this machine's byte order, because the kernel that runs them has.
pub const BPF_TARGET: &str = if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };
