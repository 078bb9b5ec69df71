package p2p

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spirt-ml/spirt/internal/treehash"
)

const (
	// MaxMembers bounds a roster, MaxIndex the index of a member.
	MaxMembers = 1024
	MaxIndex   = 1<<16 - 1

	defaultHeartbeat = 250 * time.Millisecond
	// missedHeartbeats in a row make a connected member count as gone.
	missedHeartbeats = 8
)

// Config says who this peer is, whom it talks to and what it serves.
type Config struct {
	// Key is this peer's identity. Its public half must be among Members.
	Key ed25519.PrivateKey
	// Listen holds multiaddresses or host:port; port 0 takes a free one. Empty:
	// the peer dials and is not dialled.
	Listen []string
	// Members are the roster, at most MaxMembers. [Host.SetMembers] changes it.
	Members []Member
	// Job binds connections to one job: members of different jobs do not talk,
	// also where their keys are the same.
	Job [32]byte
	// Check decodes and verifies one signed message. It must say the same for
	// the same bytes on every peer, since a member that passes on what Check
	// rejects is disconnected; except that an error which wraps ErrNotYet
	// blames nobody. It is called by several goroutines at once and must not
	// keep data.
	Check func(data []byte) (Meta, error)
	// Guests answers requests of strangers to join, sent with [Ask]; an error's
	// text is sent to the stranger. Nil turns strangers away. Requests have at
	// most MaxAsk bytes, answers MaxAnswer; at most 8 strangers are connected at
	// once, 4 of one address, for 15 s each, when ctx ends. Members may ask too.
	Guests func(ctx context.Context, remote PeerID, request []byte) (answer []byte, err error)
	// Bodies is what this peer serves to others. Nil serves nothing.
	Bodies Bodies
	// Packing says when this peer asks for chunks of bodies packed.
	Packing Packing
	// Heartbeat is the interval at which members hear from each other; the
	// same for all members of a job. A member silent for eight intervals is
	// disconnected. Zero: 250 ms.
	Heartbeat time.Duration
	// Logger gets what happens to connections. Nil: nobody does.
	Logger *slog.Logger
	// Limits bound memory and time. Every zero field takes its default.
	Limits Limits
}

// A Member is one identity of a roster.
type Member struct {
	// Index names the member in events and calls, 0 to MaxIndex. Indices may
	// have holes: one that was a member's is never given to another.
	Index int
	Key   ed25519.PublicKey
}

// Meta is what Check finds in a signed message.
type Meta struct {
	ID   [32]byte // names the message; equal for equal messages only
	From int      // the member that signed it
	Slot uint64   // Forget drops messages by it
	// Sticky messages are kept apart from the others: of each signer the 32
	// with the highest slots, 256 KiB at most (or one message). Forget leaves
	// them alone, they outlast their signer's membership, and who connects is
	// offered them first.
	Sticky bool
}

// ErrNotYet says of a message that it cannot be judged yet, since the roster
// that it was signed under is not known here. It is judged again later.
var ErrNotYet = errors.New("the message cannot be judged yet")

// Bodies finds bodies by hash.
type Bodies interface {
	// Body returns the bytes that hash to h, or ok false if they are not here.
	// They must not change until release is called, once, by the caller. It is
	// called by several goroutines at once.
	Body(h treehash.Hash) (data []byte, release func(), ok bool)
}

// Limits bound what others can make this peer hold. The zero value is the
// default.
type Limits struct {
	// MessageSize is the largest message in bytes. Zero: 64 KiB; at most 16 MiB.
	MessageSize int
	// BodySize is the largest body in bytes, fetched or served. Zero: 1 GiB.
	BodySize int64
	// KeptMessages is the number of messages kept of each member for those
	// that connect later. Zero: 256. Those with the highest slots stay.
	KeptMessages int
	// KeptBytes is their total size for each member. Zero: 1 MiB, or four
	// times MessageSize if that is more.
	KeptBytes int
	// Queue is the number of frames that wait for one member to read them; one
	// more and it is disconnected. Zero: 4096.
	Queue int
	// Events is the number of events that wait to be read; beyond it members
	// are no longer read from. Zero: 1024.
	Events int
	// BodyStreams is the number of streams on which one member may fetch bodies
	// from this peer at once. Zero: 16, or twice the members if that is more.
	BodyStreams int
	// Serves is the number of one member's requests for bodies that are answered
	// at once. Zero: 4.
	Serves int
	// Sources is the number of members that one large body is fetched from at
	// once. Zero: 8.
	Sources int
	// Chunk is the time in which one chunk or manifest must be read or
	// written. Zero: 15 s.
	Chunk time.Duration
	// Fetch is how long a Fetch takes at most whose context has no deadline.
	// Zero: 1 min.
	Fetch time.Duration
	// Neighbours is the number of members up to which all are connected to all.
	// On larger rosters each is connected to some, and dials others when it
	// fetches from them: Connected and Disconnected then say that a member is
	// there, for all that others tell, and messages reach it through others. It
	// must be the same for all members of a job. Zero: 24.
	Neighbours int
	// Rate is the number of messages that one member may sign in a second, for
	// long, and Burst at once. What it sends beyond counts like messages that
	// fail Check; what others pass on of it is dropped. The same rate holds for
	// what a connection brings that is of no use. Zero: 1000 and 4000.
	Rate, Burst int
	// Bad is the number of messages that fail Check, or of false chunks and
	// manifests, after which a member is disconnected. Zero: 8.
	Bad int
	// Penalty is how long it is refused then. Zero: 1 min.
	Penalty time.Duration
}

const (
	maxMessageSize = 16 << 20
	maxBodySize    = 1 << 40 // the chunk index on the wire has 32 bits
)

func orDefault[T int | int64 | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

const defaultNeighbours = 24

// capacity is the number of members that connections and memory are provided
// for: the roster may grow.
func (l Limits) capacity(members int) int {
	n := l.Neighbours
	orDefault(&n, defaultNeighbours)
	return max(members, min(n, MaxMembers))
}

// withDefaults returns the limits in force for a roster of n members.
func (l Limits) withDefaults(n int) (Limits, error) {
	for _, f := range []struct {
		name string
		v    int64
	}{
		{"MessageSize", int64(l.MessageSize)}, {"BodySize", l.BodySize}, {"KeptMessages", int64(l.KeptMessages)},
		{"KeptBytes", int64(l.KeptBytes)}, {"Queue", int64(l.Queue)}, {"Events", int64(l.Events)},
		{"BodyStreams", int64(l.BodyStreams)}, {"Serves", int64(l.Serves)}, {"Sources", int64(l.Sources)},
		{"Neighbours", int64(l.Neighbours)}, {"Rate", int64(l.Rate)}, {"Burst", int64(l.Burst)}, {"Chunk", int64(l.Chunk)}, {"Fetch", int64(l.Fetch)}, {"Bad", int64(l.Bad)}, {"Penalty", int64(l.Penalty)},
	} {
		if f.v < 0 {
			return l, fmt.Errorf("limit %s is negative (%d): leave it zero for the default", f.name, f.v)
		}
	}
	orDefault(&l.Neighbours, defaultNeighbours)
	if l.MessageSize > maxMessageSize {
		return l, fmt.Errorf("limit MessageSize is %d: at most %d", l.MessageSize, maxMessageSize)
	}
	if l.BodySize > maxBodySize {
		return l, fmt.Errorf("limit BodySize is %d: at most %d", l.BodySize, int64(maxBodySize))
	}
	orDefault(&l.MessageSize, 64<<10)
	orDefault(&l.BodySize, 1<<30)
	orDefault(&l.KeptMessages, 256)
	orDefault(&l.KeptBytes, max(1<<20, 4*l.MessageSize))
	orDefault(&l.Queue, 4096)
	orDefault(&l.Events, 1024)
	orDefault(&l.BodyStreams, max(16, 2*n))
	orDefault(&l.Serves, 4)
	orDefault(&l.Sources, 8)
	orDefault(&l.Chunk, 15*time.Second)
	orDefault(&l.Fetch, time.Minute)
	orDefault(&l.Rate, 1000)
	orDefault(&l.Burst, 4000)
	orDefault(&l.Bad, 8)
	orDefault(&l.Penalty, time.Minute)
	return l, nil
}

// validate returns c with its defaults filled in.
func (c Config) validate() (Config, error) {
	if len(c.Key) != ed25519.PrivateKeySize {
		return c, fmt.Errorf("an Ed25519 private key has %d bytes, not %d", ed25519.PrivateKeySize, len(c.Key))
	}
	if c.Check == nil {
		return c, errors.New("no Check: messages cannot be verified")
	}
	if c.Heartbeat < 0 || c.Heartbeat > time.Minute {
		return c, fmt.Errorf("heartbeat of %v: want at most one minute, or zero for %v", c.Heartbeat, defaultHeartbeat)
	}
	orDefault(&c.Heartbeat, defaultHeartbeat)
	if c.Packing > PackNever {
		return c, fmt.Errorf("packing %d: want PackAuto, PackAlways or PackNever", c.Packing)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	var err error
	c.Limits, err = c.Limits.withDefaults(c.Limits.capacity(len(c.Members)))
	return c, err
}
