package spirt

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spirt-ml/spirt/function/gradient"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

// database is where a peer's tensors lie: a tensordb.DB in its own process, or
// one in another, whose checkpoints are still in the peer's folder.
type database interface {
	Set(key string, t tensor.Tensor) (uint64, error)
	Get(key string) (*tensordb.Ref, error)
	Stat(key string) (tensordb.Meta, error)
	Draft(dtype tensor.DType, shape ...int) (*tensordb.Draft, error)
	Exists(key string) bool
	Keys(prefix string) []string
	Copy(dst, src string) error
	Rename(dst, src string) error
	Delete(keys ...string) int
	Hash(key string) (treehash.Hash, error)
	SetStep(key string, step uint64) error
	Accumulator(key string, length, minibatches, window int) error
	Accumulate(key string, minibatch int, gradient []float32) (tensordb.Status, error)
	Skip(key string, minibatch int) error
	Average(dst, key string) (counted int, err error)
	Half(dst, src string) error
	Mean(dst string, keys []string, weights []uint32) error
	Update(k tensordb.UpdateKeys, step uint64, c optim.Config) (applied bool, err error)
	Checkpoint(name string, keys []string, meta map[string]string) error
	Checkpoints() ([]string, error)
	Recover(name string) (meta map[string]string, err error)
	RemoveCheckpoint(name string) error
	Close() error
}

// remote is a database in another process. Checkpoints are what a peer may
// have promised others, so they do not depend on how that process keeps what it
// has: they go through a database in memory to the peer's own disk.
type remote struct {
	*tensordb.Client
	local *tensordb.DB
}

func (r *remote) Checkpoint(name string, keys []string, meta map[string]string) error {
	defer r.local.Delete(keys...)
	for _, key := range keys {
		ref, err := r.Get(key)
		if err != nil {
			return err
		}
		_, err = r.local.Set(key, ref.Tensor())
		err = errors.Join(err, r.local.SetStep(key, ref.Step()))
		ref.Release()
		if err != nil {
			return err
		}
	}
	return r.local.Checkpoint(name, keys, meta)
}

func (r *remote) Checkpoints() ([]string, error)     { return r.local.Checkpoints() }
func (r *remote) RemoveCheckpoint(name string) error { return r.local.RemoveCheckpoint(name) }

func (r *remote) Recover(name string) (map[string]string, error) {
	meta, err := r.local.Recover(name)
	if err != nil {
		return nil, err
	}
	keys := r.local.Keys("")
	defer r.local.Delete(keys...)
	for _, key := range keys {
		ref, err := r.local.Get(key)
		if err != nil {
			return nil, err
		}
		_, err = r.Set(key, ref.Tensor())
		err = errors.Join(err, r.SetStep(key, ref.Step()))
		ref.Release()
		if err != nil {
			return nil, err
		}
	}
	return meta, nil
}

func (r *remote) Close() error { return errors.Join(r.Client.Close(), r.local.Close()) }

// exchange is how tensors travel between a peer and its functions through a
// Redis server that has no tensor commands: all is fetched, computed and stored
// again. What is stored there is removed after a while, whatever becomes of the
// peer.
type exchange struct {
	conn *tensordb.Client
	db   *tensordb.DB // where the peer computes

	mu        sync.Mutex
	published map[string]time.Time
}

// exchanged is how long what is stored for functions stays.
const exchanged = time.Hour

// publish stores a tensor's bytes for functions to read.
func (x *exchange) publish(key string) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if at, ok := x.published[key]; ok && time.Since(at) < exchanged/2 {
		return nil
	}
	ref, err := x.db.Get(key)
	if err != nil {
		return err
	}
	defer ref.Release()
	if err := x.conn.Do(nil, "SET", key, ref.Tensor().Data, "EX", int64(exchanged/time.Second)); err != nil {
		return fmt.Errorf("storing %q for functions: %w", key, err)
	}
	for old, at := range x.published {
		if time.Since(at) > 2*exchanged {
			delete(x.published, old)
		}
	}
	x.published[key] = time.Now()
	return nil
}

// withdraw removes what no function reads any more.
func (x *exchange) withdraw(keys ...string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, key := range keys {
		if _, ok := x.published[key]; ok {
			delete(x.published, key)
			x.conn.Do(nil, "DEL", key) // else it is removed later
		}
	}
}

// collect fetches the gradient that a function has stored, and adds it to the
// sum.
func (x *exchange) collect(sum string, minibatch int) error {
	key := gradient.StoredKey(sum, minibatch)
	var floats []float32
	err := x.conn.Do(func(r resp.Reply) error {
		if r.Kind != resp.Bulk || len(r.Bytes)%4 != 0 {
			return fmt.Errorf("the gradient of minibatch %d is not in the database although its function ended well", minibatch)
		}
		floats = tensor.Floats(bytes.Clone(r.Bytes))
		return nil
	}, "GET", key)
	if err != nil {
		return err
	}
	x.conn.Do(nil, "DEL", key) // else it is removed later
	_, err = x.db.Accumulate(sum, minibatch, floats)
	return err
}

// dropping is a DB that withdraws what it deletes.
type dropping struct {
	*tensordb.DB
	exchange *exchange
}

func (d *dropping) Delete(keys ...string) int {
	d.exchange.withdraw(keys...)
	return d.DB.Delete(keys...)
}

func (d *dropping) Close() error { return errors.Join(d.DB.Close(), d.exchange.conn.Close()) }

// openRemote connects to the database that a URL names, and fills in how
// functions reach it.
func (p *peer) openRemote(text, prefix string) error {
	address, err := tensordb.ParseAddress(text)
	if err != nil {
		return &UsageError{err}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	model := int64(4 * p.model.NumParams())
	client, err := tensordb.Connect(ctx, address, tensordb.ClientConfig{CacheBytes: model * int64(8+2*(p.job.Peers+newcomers))})
	if err != nil {
		return err
	}
	at := &p.computer.base.Database
	at.Network, at.Address, at.User, at.Token, at.Index = address.Network, address.Address, address.User, address.Password, address.Index
	has, err := client.Knows("TENSOR.SET")
	grants, err2 := client.Knows("GRANT")
	if err = errors.Join(err, err2); err != nil {
		client.Close()
		return fmt.Errorf("asking the database what it can: %w", err)
	}
	local, err := tensordb.Open(tensordb.Config{Dir: filepath.Join(p.dir, databaseDir), MaxMemory: p.databaseMemory(), Logger: p.log})
	if err != nil {
		client.Close()
		return err
	}
	if has {
		p.db = &remote{client, local}
	} else {
		at.Stored = true
		x := &exchange{conn: client, db: local, published: map[string]time.Time{}}
		p.db, p.computer.exchange = &dropping{local, x}, x
		p.warn("the Redis server at %s has no tensor commands: tensors are fetched, computed and stored again, which is slower; load the module spirt.so (docs/redis.md)", address)
	}
	p.onClose(p.db.Close)
	if grants { // it is one of ours
		at.User, at.Token, p.computer.sign = "", "", client.Sign
		return nil
	}
	revoke, err := functionUser(client, at, prefix)
	if err != nil {
		p.warn("functions connect to %s as the peer does, and may use all that it may: it makes no user for them (%v)", address, err)
	} else {
		p.onClose(revoke)
	}
	p.computer.sign = func(tensordb.Grant) (string, error) { return at.Token, nil }
	return nil
}

// functionUser makes a Redis user that may use the keys of one peer and only
// what a function needs, and has functions connect as that.
func functionUser(client *tensordb.Client, at *gradient.Database, prefix string) (revoke func() error, err error) {
	secret := make([]byte, 24)
	rand.Read(secret) // never fails
	name := "spirt-" + strings.Trim(strings.NewReplacer("{", "", "}", "", ":", "-").Replace(prefix), "-")
	rules := []any{"ACL", "SETUSER", name, "reset", "on", ">" + hex.EncodeToString(secret), "~" + prefix + "*"}
	for _, command := range append([]string{"auth", "hello", "ping", "select"}, gradient.Commands(at.Stored)...) {
		rules = append(rules, "+"+strings.ToLower(command))
	}
	if err := client.Do(nil, rules...); err != nil {
		return nil, err
	}
	at.User, at.Token = name, hex.EncodeToString(secret)
	return func() error {
		client.Do(nil, "ACL", "DELUSER", name) // a server that is gone has none
		return nil
	}, nil
}
