package spirt

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/internal/round"
)

func newRand(t testing.TB) *rand.Rand {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// anyShares returns those of a roster with holes, members of every speed and
// some with data of their own; one at least is dealt to.
func anyShares(rng *rand.Rand) shares {
	var s shares
	for i := range 1 + rng.IntN(10) {
		if rng.IntN(4) > 0 {
			s = append(s, share{member: i, minibatches: 1 + rng.IntN(5), private: rng.IntN(4) == 0})
		}
	}
	return append(s, share{member: 20, minibatches: 1 + rng.IntN(3)})
}

// However often the roster changes, the places of the minibatches are 0, 1, 2
// and so on, each dealt to one member: so every sample of an epoch is dealt
// exactly once.
func TestSharesDealOnce(t *testing.T) {
	rng := newRand(t)
	for range 50 {
		var position uint64
		var places []uint64
		order := dataset.Order{Seed: rng.Uint64(), Len: 1 + rng.IntN(300)}
		size := 1 + rng.IntN(20)
		var rows []int
		for range 1 + rng.IntN(4) { // rosters
			s := anyShares(rng)
			for range rng.IntN(30) { // rounds
				for _, m := range s {
					own, before, err := s.of(m.member)
					check(t, err)
					if own != m {
						t.Fatalf("the share of member %d is %+v", m.member, own)
					}
					for i := range own.minibatches {
						if !own.private {
							places = append(places, position+before+uint64(i))
							rows = append(rows, order.Minibatch(position+before+uint64(i), size)...)
						}
					}
				}
				position += s.dealt()
			}
		}
		for i, p := range places {
			if p != uint64(i) {
				t.Fatalf("minibatch %d stands at place %d", p, i)
			}
		}
		for at := 0; at+order.Len <= len(rows); at += order.Len {
			epoch := slices.Clone(rows[at : at+order.Len])
			slices.Sort(epoch)
			for i, r := range epoch {
				if i != r {
					t.Fatalf("the epoch at sample %d does not hold each of %d once", at, order.Len)
				}
			}
		}
	}
}

// The parts of all members are the whole, and each is as large as its member
// is fast.
func TestSharesPart(t *testing.T) {
	rng := newRand(t)
	for range 100 {
		s, n, next := anyShares(rng), rng.IntN(10000), 0
		for _, m := range s {
			lo, hi, err := s.part(n, m.member)
			if m.private {
				refused(t, err, "data of its own")
				continue
			}
			check(t, err)
			if fair := float64(n) * float64(m.minibatches) / float64(s.dealt()); lo != next || float64(hi-lo) < fair-1 || float64(hi-lo) > fair+1 {
				t.Fatalf("%+v: member %d has %d to %d of %d", s, m.member, lo, hi, n)
			}
			next = hi
		}
		if next != n {
			t.Fatalf("the parts end at %d of %d", next, n)
		}
	}
	for member := range 4 { // as before there were rosters
		lo, hi, err := equalShares(4, 3).part(7001, member)
		check(t, err)
		if wantLo, wantHi := 7001*member/4, 7001*(member+1)/4; lo != wantLo || hi != wantHi {
			t.Errorf("member %d of equal ones has %d to %d, not %d to %d", member, lo, hi, wantLo, wantHi)
		}
	}
}

func TestSharesOf(t *testing.T) {
	got := sharesOf([]membership.Member{{Index: 0}, {Index: 2, Minibatches: 3}, {Index: 9, Private: true}}, 4)
	if want := (shares{{0, 4, false}, {2, 3, false}, {9, 4, true}}); !slices.Equal(got, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if got := sharesOf(make([]membership.Member, 1), 1<<16)[0].minibatches; got != 1<<16 {
		t.Errorf("%d minibatches", got)
	}
}

func TestSharesWeights(t *testing.T) {
	s := shares{{member: 1, minibatches: 2}, {member: 5, minibatches: 1, private: true}, {member: 6, minibatches: 8}}
	w, err := s.weights([]round.Entry{{Peer: 1}, {Peer: 5}, {Peer: 6}})
	check(t, err)
	if !slices.Equal(w, []uint32{2, 1, 8}) {
		t.Errorf("weights %v", w)
	}
	_, err = s.weights([]round.Entry{{Peer: 1}, {Peer: 2}})
	refused(t, err, "peer 3 is not on the roster")
	_, _, err = s.of(0)
	refused(t, err, "peer 1 is not on the roster")
	_, _, err = s.part(10, 7)
	refused(t, err, "peer 8 is not on the roster")
}
