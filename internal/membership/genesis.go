package membership

import (
	"crypto/ed25519"
	"errors"
	"fmt"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// Genesis is what all peers of a job agree on for ever. It may not be changed
// once it is encoded.
type Genesis struct {
	// Arithmetic is the version of everything that decides a model's bits.
	Arithmetic uint64
	// Job describes the job and its model. What it says is the caller's.
	Job []byte
	// Admins are the keys that may sign rosters, each different; K of them
	// must.
	Admins []ed25519.PublicKey
	K      uint8
	// CheckpointEvery is how many heights there are between two checkpoints
	// that are voted on.
	CheckpointEvery uint64
	// Nonce makes two jobs of one content and one admin different.
	Nonce [16]byte
}

type wireGenesis struct {
	_               struct{} `cbor:",toarray"`
	Version         uint64
	Arithmetic      uint64
	Job             []byte
	Admins          []key
	K               uint8
	CheckpointEvery uint64
	Nonce           [16]byte
}

// Encode returns the one encoding of a valid genesis.
func (g *Genesis) Encode() []byte {
	w := wireGenesis{Version: version, Arithmetic: g.Arithmetic, Job: list(g.Job), Admins: []key{}, K: g.K, CheckpointEvery: g.CheckpointEvery, Nonce: g.Nonce}
	for _, a := range g.Admins {
		w.Admins = append(w.Admins, keyOf(a))
	}
	return mustEncode(&w)
}

// ID names the job.
func (g *Genesis) ID() Hash { return treehash.Sum(domain(genesisDomain, g.Encode())) }

// DecodeGenesis reads and checks what Encode wrote.
func DecodeGenesis(b []byte) (*Genesis, error) {
	var w wireGenesis
	if err := decode(b, MaxGenesisBytes, &w); err != nil {
		return nil, fmt.Errorf("genesis: %w", err)
	}
	if err := checkVersion(w.Version); err != nil {
		return nil, fmt.Errorf("genesis: %w", err)
	}
	g := &Genesis{Arithmetic: w.Arithmetic, Job: w.Job, K: w.K, CheckpointEvery: w.CheckpointEvery, Nonce: w.Nonce}
	for _, a := range w.Admins {
		g.Admins = append(g.Admins, a.public())
	}
	if err := g.Validate(); err != nil {
		return nil, fmt.Errorf("genesis: %w", err)
	}
	return g, nil
}

// Validate checks what can be checked of a genesis alone.
func (g *Genesis) Validate() error {
	switch n := len(g.Admins); {
	case n < 1 || n > MaxAdmins:
		return fmt.Errorf("%d admin keys: 1 to %d are possible", n, MaxAdmins)
	case g.K < 1 || int(g.K) > n:
		return fmt.Errorf("%d of %d admin keys must sign: take 1 to %d", g.K, n, n)
	case len(g.Job) == 0 || len(g.Job) > MaxGenesisBytes-2<<10:
		return fmt.Errorf("a job of %d bytes", len(g.Job))
	case g.CheckpointEvery < 1 || g.CheckpointEvery > 1<<20:
		return fmt.Errorf("a checkpoint every %d heights: take 1 to %d", g.CheckpointEvery, 1<<20)
	}
	seen := make(map[key]bool, len(g.Admins))
	for i, a := range g.Admins {
		if len(a) != ed25519.PublicKeySize {
			return fmt.Errorf("admin key %d has %d bytes", i+1, len(a))
		}
		if seen[keyOf(a)] {
			return fmt.Errorf("admin key %d stands twice", i+1)
		}
		seen[keyOf(a)] = true
	}
	return nil
}

// Admin returns which admin a key is.
func (g *Genesis) Admin(public ed25519.PublicKey) (int, error) {
	for i, a := range g.Admins {
		if a.Equal(public) {
			return i, nil
		}
	}
	return 0, errors.New("the key is none of the job's admin keys")
}

// First returns the roster of epoch 0, without members and signatures.
func (g *Genesis) First() *Roster { return &Roster{Job: g.ID()} }
