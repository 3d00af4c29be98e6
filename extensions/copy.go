package extensions

import "reflect"

// deepCopy returns a copy of v, a tree of data, that shares nothing with it. A round trip through JSON would not do: it
// changes paths that are not UTF-8, and drops what is empty.
func deepCopy[T any](v T) T {
	var c T
	copyValue(reflect.ValueOf(&c).Elem(), reflect.ValueOf(&v).Elem())
	return c
}

func copyValue(dst, src reflect.Value) {
	switch src.Kind() {
	case reflect.Pointer, reflect.Interface, reflect.Map, reflect.Slice:
		if src.IsNil() {
			return
		}
	}
	switch src.Kind() {
	case reflect.Pointer:
		dst.Set(reflect.New(src.Type().Elem()))
		copyValue(dst.Elem(), src.Elem())
	case reflect.Interface:
		held := reflect.New(src.Elem().Type()).Elem()
		copyValue(held, src.Elem())
		dst.Set(held)
	case reflect.Map:
		dst.Set(reflect.MakeMapWithSize(src.Type(), src.Len()))
		for key, value := range src.Seq2() {
			c := reflect.New(value.Type()).Elem()
			copyValue(c, value)
			dst.SetMapIndex(key, c)
		}
	case reflect.Slice:
		dst.Set(reflect.MakeSlice(src.Type(), src.Len(), src.Len()))
		for i := range src.Len() {
			copyValue(dst.Index(i), src.Index(i))
		}
	case reflect.Struct:
		dst.Set(src)
		for i := range src.NumField() {
			if dst.Field(i).CanSet() {
				dst.Field(i).SetZero()
				copyValue(dst.Field(i), src.Field(i))
			}
		}
	default:
		dst.Set(src)
	}
}
