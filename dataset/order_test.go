package dataset

import (
	"slices"
	"testing"
)

// The rows are part of what makes two runs with one seed alike: a change of
// these numbers breaks resuming old runs and needs a new key in shuffled.
func TestOrderGolden(t *testing.T) {
	for _, c := range []struct {
		o    Order
		k    uint64
		size int
		want []int
	}{
		{Order{Seed: 1, Peer: 0, Len: 1750}, 0, 8, []int{153, 244, 567, 357, 1185, 1305, 643, 1613}},
		{Order{Seed: 1, Peer: 3, Len: 1750}, 0, 8, []int{1722, 1177, 98, 120, 271, 1225, 1247, 126}},
		{Order{Seed: 1, Peer: 0, Len: 1750}, 27, 8, []int{1409, 929, 769, 826, 1466, 507, 652, 865}},
		{Order{Seed: 1, Peer: 0, Len: 1750}, 1 << 40, 8, []int{1611, 1509, 411, 1296, 1, 415, 1665, 972}},
		{Order{Seed: 1<<64 - 1, Peer: 0, Len: 5}, 1, 12, []int{4, 1, 2, 3, 4, 0, 2, 1, 0, 3, 4, 2}},
		{Order{Seed: 7, Peer: 1, Len: 1}, 3, 2, []int{0, 0}},
	} {
		if got := c.o.Minibatch(c.k, c.size); !slices.Equal(got, c.want) {
			t.Errorf("%+v minibatch %d: %#v, want %v", c.o, c.k, got, c.want)
		}
	}
}

// Laid end to end, the minibatches are one permutation of the shard after the
// other, whatever the size of a minibatch.
func TestOrderVisitsAll(t *testing.T) {
	const epochs = 4
	for _, n := range []int{1, 2, 7, 64, 100} {
		for _, size := range []int{1, 3, 7, 64, 250} {
			o := Order{Seed: 42, Peer: 2, Len: n}
			var rows []int
			for k := uint64(0); len(rows) < epochs*n; k++ {
				m := o.Minibatch(k, size)
				if len(m) != size {
					t.Fatalf("a minibatch of %d, not %d", len(m), size)
				}
				rows = append(rows, m...)
			}
			for e := range epochs {
				epoch := slices.Clone(rows[e*n : (e+1)*n])
				slices.Sort(epoch)
				for i, r := range epoch {
					if r != i {
						t.Fatalf("%d rows, minibatches of %d: epoch %d does not visit each row once", n, size, e)
					}
				}
			}
		}
	}
}

func TestOrderDiffers(t *testing.T) {
	first := Order{Seed: 1, Peer: 0, Len: 1000}
	for name, o := range map[string]Order{
		"seed": {Seed: 2, Peer: 0, Len: 1000},
		"peer": {Seed: 1, Peer: 1, Len: 1000},
	} {
		if slices.Equal(o.Minibatch(0, 64), first.Minibatch(0, 64)) {
			t.Errorf("another %s has the same order", name)
		}
	}
	if slices.Equal(first.Minibatch(0, 1000), first.Minibatch(1, 1000)) {
		t.Error("two epochs have the same order")
	}
}

// Each row must be equally likely at each place: chi-squared over 8 rows and
// 4,000 seeds with 7 degrees of freedom, whose 99.99 % quantile is 29.9.
func TestOrderUniform(t *testing.T) {
	const n, seeds = 8, 4000
	var count [n][n]float64
	for seed := range uint64(seeds) {
		for place, row := range (Order{Seed: seed, Len: n}).Minibatch(0, n) {
			count[place][row]++
		}
	}
	for place := range count {
		var chi float64
		for _, c := range count[place] {
			chi += (c - seeds/n) * (c - seeds/n) / (seeds / n)
		}
		if chi > 29.9 {
			t.Errorf("place %d: chi-squared %.1f, counts %v", place, chi, count[place])
		}
	}
}

func BenchmarkMinibatch(b *testing.B) {
	o := Order{Seed: 1, Len: 1750}
	for k := uint64(0); b.Loop(); k++ {
		o.Minibatch(k, 64)
	}
}
