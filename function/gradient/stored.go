package gradient

import (
	"context"
	"fmt"

	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
)

// storedLife is how long a gradient that nobody fetches stays in Redis, in
// seconds.
const storedLife = 3600

// StoredKey is where a function stores the gradient of a minibatch in a Redis
// server without tensor commands, where the peer fetches it.
func StoredKey(sum string, minibatch int) string { return fmt.Sprintf("%s/%d", sum, minibatch) }

// Commands are those that the function sends to the database beside AUTH and
// SELECT; stored is as in [Database].
func Commands(stored bool) []string {
	if stored {
		return []string{"GET", "GETRANGE", "SET"}
	}
	return []string{"TENSOR.GET", "TENSOR.ROWS", "TENSOR.ACCUMULATE"}
}

// readStored is read for a Redis server without tensor commands, where each
// key holds a tensor's bytes alone.
func (r *run) readStored(ctx context.Context, rows []int) (labels, images resp.Reply, err error) {
	h, in := r.h, r.h.model.InputLen()
	pixels := make([]byte, len(rows)*in)
	classes := make([]byte, len(rows))
	commands := make([]resp.Command, 0, 2*len(rows)+1)
	for i, row := range rows {
		commands = append(commands,
			resp.Command{Args: []any{"GETRANGE", r.e.Labels, row, row}, Dst: classes[i : i+1]},
			resp.Command{Args: []any{"GETRANGE", r.e.Images, int64(row) * int64(in), int64(row+1)*int64(in) - 1}, Dst: pixels[i*in : (i+1)*in]})
	}
	want := r.e.Parameters
	ask := h.held != want // a key of parameters never holds others
	if ask {
		h.held = Parameters{}
		commands = append(commands, resp.Command{Args: []any{"GET", want.Key}, Dst: tensor.Bytes(h.params)})
	}
	replies, err := r.do(ctx, commands...)
	if err != nil {
		return labels, images, err
	}
	for i := range rows {
		for j, want := range []int{1, in} {
			reply := replies[2*i+j]
			if reply.Kind != resp.Bulk || len(reply.Bytes) != want {
				return labels, images, bad("row %d of %q or %q is not there, or images do not have %d bytes", rows[i], r.e.Labels, r.e.Images, in)
			}
			if j == 0 {
				classes[i] = reply.Bytes[0]
			} else {
				copy(pixels[i*in:], reply.Bytes)
			}
		}
	}
	if ask {
		reply := replies[2*len(rows)]
		if reply.Kind != resp.Bulk || len(reply.Bytes) != 4*len(h.params) {
			return labels, images, fail(Stale, "parameters %q are not there, or not %d float32", want.Key, len(h.params))
		}
		copy(tensor.Bytes(h.params), reply.Bytes)
		h.held = want
	}
	return resp.Reply{Kind: resp.Bulk, Bytes: classes}, resp.Reply{Kind: resp.Bulk, Bytes: pixels}, nil
}

// store stores the gradient for the peer to fetch.
func (r *run) store(ctx context.Context) error {
	_, err := r.do(ctx, resp.Command{Args: []any{"SET", StoredKey(r.e.Accumulate, r.e.Minibatch), tensor.Bytes(r.h.gradient), "EX", storedLife}})
	r.result.Status = "stored"
	return err
}
