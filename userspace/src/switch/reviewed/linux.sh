#!/bin/sh
# qjump switch-config, for levels 7, 5 and 4 of a plan of 12 hosts with links of 10gbit. Level =
#   DSCP CS(level) = traffic class = queue. All other codepoints are best effort, class 0.
# Codepoints of routing protocols that pass through (CS6) are best effort too, unless the plan has
#   level 6. What the switch itself sends and receives does not go by these maps.
# Then look whether it worked: qjump measure switch-check HOST --rate RATE.
# Factory: a bridge does not look at DSCP, and a router takes the priority from bits that class
#   selectors leave 0: queue 0: levels 7, 5, 4 and 0.
# For a switch that forwards by its CPU. A chip that forwards by itself does not pass tc, unless its
#   driver offloads these queues (`tc qdisc show` then says so).
# 802.3x link pause stops all levels at once: `ethtool -A PORT rx off tx off`. Take back: `tc qdisc
#   del dev PORT root`.
set -eu

# Bands of strict priority where the kernel has prio. Else HTB, whose classes have next to nothing of their
# own and borrow the rest by priority; it has to know the rate of the port.
bands() {
    tc qdisc del dev "$1" root 2>/dev/null || :
    if tc qdisc add dev "$1" root handle 1: prio bands 4 priomap 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 3 2>/dev/null; then
        return
    fi
    tc qdisc add dev "$1" root handle 1: htb default 4
    tc class add dev "$1" parent 1: classid 1:100 htb rate 10gbit ceil 10gbit \
        burst 25000 cburst 25000 overhead 24 mpu 84 quantum 1514
    for band in 1 2 3 4; do
        tc class add dev "$1" parent 1:100 classid 1:$band htb rate 1kbit ceil 10gbit \
            prio $((band - 1)) burst 25000 cburst 25000 overhead 24 mpu 84 quantum 1514
        tc qdisc add dev "$1" parent 1:$band bfifo limit 4194304
    done
}

# PORT BAND, and the first 16 bits of an IPv4 and of an IPv6 header with this mark; ECN bits do not count.
# VLAN tags have been taken off when filters run, but the protocol is still that of the tag.
mark() {
    tc filter add dev "$1" parent 1: protocol ip prio 1 u32 match u16 $3 0xf0fc at 0 flowid 1:$2
    tc filter add dev "$1" parent 1: protocol ipv6 prio 2 u32 match u16 $4 0xffc0 at 0 flowid 1:$2
    tc filter add dev "$1" parent 1: protocol 802.1Q prio 3 u32 match u16 $3 0xf0fc at 0 flowid 1:$2
    tc filter add dev "$1" parent 1: protocol 802.1Q prio 3 u32 match u16 $4 0xffc0 at 0 flowid 1:$2
}

for port in swp1 swp2; do
    bands "$port"
    mark "$port" 1 0x40e0 0x6e00 # level 7, CS7
    mark "$port" 2 0x40a0 0x6a00 # level 5, CS5
    mark "$port" 3 0x4080 0x6800 # level 4, CS4
    # Where the card has priority flow control, it must not pause a level.
    if command -v dcb >/dev/null; then
        dcb pfc set dev "$port" prio-pfc 7:off 5:off 4:off 2>/dev/null || :
    fi
done
