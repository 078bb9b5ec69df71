package tensordb

import "fmt"

// SetStep notes that the tensor under key is the state of an optimizer after
// so many steps, as Update would have left it: for a state that comes from
// elsewhere.
func (db *DB) SetStep(key string, step uint64) error {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.closed {
		return ErrClosed
	}
	v := db.tensors[key]
	if v == nil {
		return fmt.Errorf("setting the step: %w", noKey(key))
	}
	v.blob.retain()
	db.putLocked(key, &version{blob: v.blob, dtype: v.dtype, shape: v.shape, step: step})
	return nil
}
