package tensordb

import (
	"fmt"
	"slices"

	"github.com/spirt-ml/spirt/tensor"
)

// Draft is a tensor that is being filled, in the database's own memory: what
// comes from a socket needs no copy. It has one owner, who calls Commit or
// Discard at the end.
type Draft struct {
	put    func(key string, meta Meta, b Buffer) (uint64, error)
	buffer Buffer // nil once it is committed or discarded
	meta   Meta
}

// Draft returns a tensor of this dtype and shape with arbitrary content.
func (db *DB) Draft(dtype tensor.DType, shape ...int) (*Draft, error) {
	n, err := tensor.DataLen(dtype, shape)
	if err != nil {
		return nil, fmt.Errorf("drafting a tensor: %w: %w", ErrWrongType, err)
	}
	b, err := db.space.Alloc(n)
	if err != nil {
		return nil, fmt.Errorf("drafting a tensor: %w", err)
	}
	return &Draft{put: db.space.Put, buffer: b, meta: Meta{DType: dtype, Shape: slices.Clone(shape)}}, nil
}

// Data returns the bytes to fill. They must not be used after Commit or
// Discard.
func (d *Draft) Data() []byte { return d.buffer.Data() }

// Commit makes the draft the current version of key, and returns its number.
// After an error the draft is discarded.
func (d *Draft) Commit(key string) (number uint64, err error) {
	if err := checkKey(key); err != nil {
		d.Discard()
		return 0, err
	}
	b := d.buffer
	d.buffer = nil
	return d.put(key, d.meta, b)
}

// Discard gives the memory back. After Commit or Discard it does nothing.
func (d *Draft) Discard() {
	if d.buffer != nil {
		d.buffer.Release()
		d.buffer = nil
	}
}
