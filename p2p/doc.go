// Package p2p connects the peers of one job: it authenticates them, carries
// their small signed messages to all, notices who is gone, and fetches large
// bodies by hash.
//
// Make an identity with [NewKey] and [WriteKey], start a [Host] with [New],
// tell it where the other members are with [Host.SetAddresses], and read
// [Host.Events] until it is closed by [Host.Close]. [Host.Broadcast] floods a
// message, [Host.Fetch] gets a body that [Config.Bodies] of some member serves.
//
// Guarantees:
//
//   - Only members of the roster, proven by their Ed25519 key in a Noise
//     handshake, get past the handshake, in both directions. Who does not is
//     reported by [Refused]. Where [Config.Guests] is set a stranger may ask to
//     join, with [Ask], and nothing else.
//     The roster may change at any time, by [Host.SetMembers].
//   - A message reaches every member that is connected to its sender or to a
//     chain of members that are, once each, in no particular order, and only
//     after [Config.Check] accepted it. A member that was away gets what is
//     still kept when it connects, sticky messages first.
//   - A body handed out by Fetch has the hash that was asked for.
//   - A lost connection is reported at once, a silent one after eight
//     heartbeat intervals; members whose addresses are known are dialled again
//     until they answer. On rosters of more than [Limits].Neighbours members
//     each is connected to some only, and who is gone is noticed by all within
//     some seconds.
//   - Memory is bounded by [Limits], whatever members send.
//
// The package believes no member: a member that sends what no honest peer
// sends is disconnected and refused for [Limits].Penalty. It does not stop a
// member from withholding messages or from signing contradictory ones; the
// layer above does.
//
// [Discover] finds peers on the local network.
//
// It is TCP, Noise and yamux of libp2p, without its host: no relay, no address
// translation. The wire formats are in docs/p2p.md.
package p2p
