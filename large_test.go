package spirt

import (
	"testing"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

// BenchmarkLarge splits what one of four peers does in a round besides its
// gradient, for 11.2 M parameters with Adam, into its parts, and times beside
// them what bounds them: a copy in memory, and the cipher of the connections.
// The transfer itself is Fetch45MB of package p2p.
func BenchmarkLarge(b *testing.B) {
	const n = 11_200_000
	db, err := tensordb.Open(tensordb.Config{Dir: b.TempDir()})
	check(b, err)
	b.Cleanup(func() { db.Close() })
	job := DefaultJob()
	check(b, job.Resolve())
	s := newStore(db, "{large:1}:", &job, n)
	vector := func(scale float32) []byte {
		v := make([]float32, n)
		for i := range v {
			v[i] = scale * float32(i%1013-506)
		}
		return tensor.Bytes(v)
	}
	model, state, err := s.putState(vector(1e-3), make([]byte, 4*s.state), 0)
	check(b, err)
	parent := round.Genesis(round.Hash{1}, round.Hash{2}, model, state)
	var set []round.Entry
	var keys []string
	for p := range 4 {
		body := vector(1e-5 * float32(p+1))
		h := treehash.Sum(body)
		draft, err := s.draft()
		check(b, err)
		copy(draft.Data(), body)
		check(b, s.putAverage(h, draft))
		set = append(set, round.Entry{Peer: round.Peer(p), Gradient: h})
		keys = append(keys, s.averageKey(h))
	}
	average, copied := vector(1), make([]byte, 4*n)
	run := func(name string, bytes int, f func()) {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(bytes))
			for b.Loop() {
				f()
			}
		})
	}
	run("copy in memory", 4*n, func() { copy(copied, average) })
	run("hash of an average", 4*n, func() { treehash.Sum(average) })
	run("hash of model and state", 4*n+4*s.state, func() {
		treehash.Sum(average)
		treehash.Sum(copied)
		treehash.Sum(copied)
	})
	run("check of three averages", 3*4*n, func() {
		for range 3 {
			check(b, s.checkAverage(average))
		}
	})
	run("mean of four", 4*4*n, func() { check(b, db.Mean(s.key("mean"), keys, nil)) })
	run("mean, update and hashes", 4*4*n, func() {
		if _, _, err := s.apply(parent, set, equalShares(4, 1)); err != nil {
			b.Fatal(err)
		}
	})
	aead, err := chacha20poly1305.New(make([]byte, chacha20poly1305.KeySize))
	check(b, err)
	nonce, frame := make([]byte, aead.NonceSize()), make([]byte, 0, 1<<17)
	run("cipher of three sent and three received", 6*4*n, func() {
		for range 3 {
			for at := 0; at < 4*n; at += 1 << 16 {
				sealed := aead.Seal(frame, nonce, average[at:min(at+1<<16, 4*n)], nil)
				if _, err := aead.Open(copied[:0], nonce, sealed, nil); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
}
