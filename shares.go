package spirt

import (
	"fmt"

	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/internal/round"
)

// share is one member's part in every round under a roster.
type share struct {
	member      int // index
	minibatches int // that it computes; also its weight in the mean
	private     bool
}

// shares are the shares of all members, by ascending index. Everything that
// follows from them is a pure function, so that all peers deal alike.
type shares []share

// equalShares are those of members 0 to peers-1 that do the same.
func equalShares(peers, minibatches int) shares {
	s := make(shares, peers)
	for i := range s {
		s[i] = share{member: i, minibatches: minibatches}
	}
	return s
}

// sharesOf returns the shares under a roster's members. Who has no number there
// computes the job's.
func sharesOf(members []membership.Member, minibatches int) shares {
	s := make(shares, len(members))
	for i, m := range members {
		s[i] = share{member: int(m.Index), minibatches: int(m.Minibatches), private: m.Private}
		orInt(&s[i].minibatches, minibatches)
	}
	return s
}

// sharesAt returns the shares that are in force after a record.
func (p *peer) sharesAt(r round.Record) shares {
	roster := p.ids.rosters.get(r.Roster)
	if roster == nil {
		return nil // the machine goes nowhere without the roster
	}
	return sharesOf(roster.Members, p.job.BatchesPerRound)
}

// dealt returns how many minibatches of the job's data a round deals out: to
// all members but those with data of their own.
func (s shares) dealt() uint64 {
	var n uint64
	for _, m := range s {
		if !m.private {
			n += uint64(m.minibatches)
		}
	}
	return n
}

// of returns a member's share, and how many of the minibatches that a round
// deals out come before its own.
func (s shares) of(member int) (own share, before uint64, err error) {
	for _, m := range s {
		if m.member == member {
			return m, before, nil
		}
		if !m.private {
			before += uint64(m.minibatches)
		}
	}
	return share{}, 0, fmt.Errorf("peer %d is not on the roster", member+1)
}

// part returns the rows of a member where each keeps one part of n: one after
// the other, in proportion to the minibatches that they compute.
func (s shares) part(n, member int) (lo, hi int, err error) {
	own, before, err := s.of(member)
	if err != nil {
		return 0, 0, err
	}
	if own.private {
		return 0, 0, fmt.Errorf("peer %d has data of its own and no part of the job's", member+1)
	}
	cut := func(dealt uint64) int { return int(uint64(n) * dealt / s.dealt()) }
	return cut(before), cut(before + uint64(own.minibatches)), nil
}

// weights returns how much each average of a set counts.
func (s shares) weights(set []round.Entry) ([]uint32, error) {
	w := make([]uint32, len(set))
	for i, e := range set {
		own, _, err := s.of(int(e.Peer))
		if err != nil {
			return nil, err
		}
		w[i] = uint32(own.minibatches)
	}
	return w, nil
}
